"""Where a Laplace or normal tensor is best clipped, by analysis and by simulation."""

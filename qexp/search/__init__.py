"""Which tensor needs how many bits: sensitivity one tensor at a time, allocation under a budget, the Pareto front."""

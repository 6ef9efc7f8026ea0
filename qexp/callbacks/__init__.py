"""Lightning callbacks: kernels, progress, curves, optimizer steps."""

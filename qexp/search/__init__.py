"""Searches for bit widths: sensitivity of single tensors, allocation under a budget, the Pareto front."""

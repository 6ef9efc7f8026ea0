"""Summaries of tensors: counts, moments, histograms."""

"""Edits of the model before and after quantization."""

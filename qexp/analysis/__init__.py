"""Errors of a quantized network by tensor, by depth and by channel, and their diagnosis."""

"""The width that stands for no quantization."""

FLOAT = 32  # bits: a tensor of this width stays float

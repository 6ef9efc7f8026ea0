"""The width that means no quantization (float)."""

FLOAT = 32  # bits: a tensor of this width stays float

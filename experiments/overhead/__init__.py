"""What quantization costs in time."""

"""What quantization did to a network: errors by tensor, by depth, by channel, and their diagnosis."""

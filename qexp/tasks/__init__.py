"""LightningModules that train and score a network; they take an `nn.Module` and know nothing of quantization."""

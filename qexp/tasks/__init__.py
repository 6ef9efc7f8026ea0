"""LightningModules that train and score a network; they take any `nn.Module`, quantized or not."""

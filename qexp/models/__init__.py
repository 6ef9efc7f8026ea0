"""Networks, each a plain `nn.Module` whose adds, concatenations, activations and pools are modules with a name."""

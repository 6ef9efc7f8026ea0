"""Facts derived from a network: execution order, shapes, layer pairs, cost."""

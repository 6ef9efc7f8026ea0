"""What is read off a network: order, shapes, pairs, cost."""

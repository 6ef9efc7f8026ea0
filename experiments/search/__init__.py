"""Which bits where: plans found by search against uniform ones of the same cost."""

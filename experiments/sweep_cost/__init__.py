"""What a sweep costs beside its evaluations."""

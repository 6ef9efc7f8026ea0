"""The error of this package."""


class KernelError(ValueError):
    """Raised for a bad argument, or for an implementation that is not available."""

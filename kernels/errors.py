"""The error of this package."""


class KernelError(ValueError):
    """What was asked for cannot be computed: a bad argument, or an implementation that is not to be had."""

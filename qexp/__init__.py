"""qexp: how few bits can this CNN live on, with which method, at what cost?

Importing `qexp` stays light: neither Lightning nor torchvision is loaded until something needs it.
"""

__version__ = "0.1.0"

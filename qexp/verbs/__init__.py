"""The front door in Python: `quantize`, `verify` and `export` for a network and images at hand; `qexp.load` for a finished run."""

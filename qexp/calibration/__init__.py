"""The calibration phase: statistics of every tensor, kept on disk and in memory, from which quantizers are fitted."""

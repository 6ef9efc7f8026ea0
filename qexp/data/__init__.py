"""Data sets as Lightning data modules that yield ready-made batches and keep train, calibration and test apart."""

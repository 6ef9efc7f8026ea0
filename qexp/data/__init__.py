"""Data sets as Lightning data modules with ready-made batches and separate training, calibration and test parts."""

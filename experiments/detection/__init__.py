"""Detectors at low bit widths, on the VOC images at hand."""

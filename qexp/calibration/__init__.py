"""What was seen (stats), the range each rule picks from it (ranges), and the phase that ties them (calibrate)."""

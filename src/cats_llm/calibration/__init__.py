"""Calibration: from text to one threshold a layer."""

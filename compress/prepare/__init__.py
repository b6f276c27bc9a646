"""The stage before calibration: text, output folder, settled options."""

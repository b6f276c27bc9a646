"""CoSpaDi: a dictionary and sparse codes for each weight, or for several that share one."""

"""One file a method; see `compress.families.base`."""

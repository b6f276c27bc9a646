"""One file a method; see `compress.compressor`."""

"""The plan of a run: each layer's compressor and bytes, before any work starts."""

"""What a run will do to each layer, in bytes, before any work starts."""

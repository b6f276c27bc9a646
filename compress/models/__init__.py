"""Models as they lie on disk: where they are found, how their tensors are read, which layers they have."""

"""A run from its recipe to a written, verified and evaluated checkpoint."""

"""Proof that an export on disk is the model that was compressed."""

"""Corrections on top of a checkpoint that is already compressed."""

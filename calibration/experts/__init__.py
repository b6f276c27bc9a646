"""Mixtures of experts: their layers taken apart, their names in a checkpoint, and statistics of each."""

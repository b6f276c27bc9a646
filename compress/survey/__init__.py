"""Measurements of the original model that a plan or a metric needs."""

"""Embeddings and heads: planned, quantised, and put into a model."""

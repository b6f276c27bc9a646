"""Numerical solvers that know matrices and budgets, no models."""

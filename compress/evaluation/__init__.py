"""The stage that evaluates an export beside its original."""

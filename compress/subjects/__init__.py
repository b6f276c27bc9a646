"""Subjects of a run: an ordinary model that is compressed, or a compressed checkpoint that is corrected."""

"""The base class of all methods, and the families that share options, plans and storage."""

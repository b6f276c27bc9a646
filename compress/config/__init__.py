"""Recipes: typed options, their YAML file, and the flags made from them."""

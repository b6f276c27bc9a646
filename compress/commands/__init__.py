"""The commands, a file for each family; `compress.cli` chooses among them."""

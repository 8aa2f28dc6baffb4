"""How fast things are, against what else does the same."""

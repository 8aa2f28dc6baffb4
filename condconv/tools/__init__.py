"""Leaves over the engine: what people do with runs and networks, each apart from the others."""

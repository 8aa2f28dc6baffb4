"""Where a run computes: the engine's face to a framework, and the choice of one."""

"""What runs in the processes that are measured, one contender in each.

Such a process may have another interpreter, or another checkout of this project, than the one that
started it. So modules in here import each other relatively, and nothing of ours on the way to what
is not ours: no Keras is needed for timm, and no ``condconv`` of this checkout for another one.
"""

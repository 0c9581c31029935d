"""How fast a sweep, a training step and a step of RL are, against what users would run otherwise: see `__main__.py`."""

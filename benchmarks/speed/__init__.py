"""The speed of a sweep, a training step and a step of RL, compared with other trainers; see `__main__.py`."""

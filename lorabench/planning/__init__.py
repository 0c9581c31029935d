"""The plan of a preset: its sweeps and jobs, and what they cost."""

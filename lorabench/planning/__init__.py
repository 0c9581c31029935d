"""The plan of a preset: its sweeps and jobs, with their resources and bill."""

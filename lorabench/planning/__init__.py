"""From a preset to runs, sweeps and jobs, with their resources, bill and budget."""

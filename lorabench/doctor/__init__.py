"""Checks of a machine before a preset is run on it: `lorabench doctor`."""

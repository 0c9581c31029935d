"""Checks of a machine before a preset is run on it: `lorabench doctor`, and the speeds by which plans state times."""

"""Measurements of speed, each a program; none is part of the package."""

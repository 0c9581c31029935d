"""Estimators of losses, optima, curves and laws: pure functions on tables, one for each quantity."""

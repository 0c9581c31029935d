"""Estimators of optima, seed noise, gaps, departures and laws, which take and return tables."""

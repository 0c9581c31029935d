"""Estimators that take and return tables."""

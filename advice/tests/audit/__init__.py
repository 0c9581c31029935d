"""Tests of the audit of other trainers' configurations."""

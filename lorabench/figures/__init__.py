"""Figures: a module for each, from tables to a picture and the table of what it plots; their catalogue and style."""

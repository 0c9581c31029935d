"""A reader for each format: which files are of it, and the training runs that a file states."""

"""The files of results: their paths, the folders of runs, and the progress of work."""

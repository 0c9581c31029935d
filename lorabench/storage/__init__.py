"""Where results lie: paths, run folders and progress."""

"""The HTML report of a preset, and the blocks that its results and claims become in the documentation."""

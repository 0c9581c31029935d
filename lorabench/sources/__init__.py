"""Sources: runs that others have published, as a folder with a file `source.yaml` beside their tables.

A source is read into the tidy tables by the mapping in its file (`schema`, `rows`, `mapping`, `reading`), judged by the
same claims as own runs (`studies`), and measured where several sources repeat a measurement (`measurements`). The
matrix of claims by scale (`matrix`) puts the verdicts side by side.
"""

"""The tidy tables: their columns, how they are made, written, read, checked and merged."""

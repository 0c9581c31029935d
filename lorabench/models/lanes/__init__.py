"""Several runs of one condition computed together over one base model."""

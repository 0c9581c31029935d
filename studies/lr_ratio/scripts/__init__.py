"""Commands of the study, which judge nothing."""

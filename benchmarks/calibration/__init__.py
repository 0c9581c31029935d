"""Calibration of the verdicts: made-up sweeps whose truth is known, judged by the code that judges real ones."""

"""The training of a job's runs, by SFT and by RL."""

"""Train the runs of a job, by SFT and by RL."""

"""Training: members, schedules, checkpoints, and the loop that feeds them all."""

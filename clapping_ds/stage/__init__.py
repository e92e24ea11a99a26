"""The stages of a rank: channels by end, lazy sampling, checkpoints, and what all ranks agree on."""

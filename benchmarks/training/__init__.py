"""What compression costs and saves in training: a table of runs for each host."""

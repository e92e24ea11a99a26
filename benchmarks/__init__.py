"""Measurements. Each folder has commands that write their figures to `benchmarks/results/`."""

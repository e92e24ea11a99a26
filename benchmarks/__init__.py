"""Measurements. Each module is a command that writes its figures to `benchmarks/results/`."""

"""Turns rows of preference data into packed micro batches: reading -> formats -> tokens -> batches. See README.md."""

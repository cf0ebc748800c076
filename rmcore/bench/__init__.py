"""Benchmarks: rmcore and its peers in alternating runs, on the same rows, model, precision, batch and threads."""

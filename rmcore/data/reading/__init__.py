"""Reads hub data sets, files and the embedded task, and yields rows, each with the place that it came from."""

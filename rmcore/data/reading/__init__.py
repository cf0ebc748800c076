"""Hub data sets, files and the embedded task in, rows out, each with the place that it came from."""

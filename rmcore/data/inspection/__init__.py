"""Describes the prepared data: counts, statistics of lengths, the first example, a plot."""

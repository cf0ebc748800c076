"""Writes report.html: the findings of a run or an evaluation in one file that needs no network."""

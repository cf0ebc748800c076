"""Serves rewards over HTTP."""

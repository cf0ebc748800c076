"""Rewards over HTTP: one queue, the endpoints, their limits, the metrics for Prometheus."""

"""Metrics, significance and the report."""

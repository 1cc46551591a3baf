"""Measured numbers as tables, as comparisons and as a report."""

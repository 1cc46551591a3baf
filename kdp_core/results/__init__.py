"""Measured numbers as tables, comparisons and the report."""

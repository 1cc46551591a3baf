"""Searches for a set of layers to remove: an evaluator of sets, what it minimises, and the ways to search."""

"""Searches for a set of layers to remove: the evaluator of sets, the objectives that a search minimises, and the
strategies of search."""

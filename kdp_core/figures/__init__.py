"""Figures of every stage, in one style."""

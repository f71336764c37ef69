"""Compute the frozen part of a model only once."""

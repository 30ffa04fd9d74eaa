"""Checks on a dataset that need neither a GPU nor torch."""

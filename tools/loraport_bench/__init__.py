"""Measuring trainers: no torch here, only processes that are started and what they tell."""

"""Measuring trainers: no torch here, only processes that are started and what they tell."""

RESULTS = "results.json"  #: a bench's data, in its folder

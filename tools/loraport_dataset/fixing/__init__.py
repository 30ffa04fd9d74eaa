"""Captions put right where what is meant is certain. What is not certain stays as it is, for the rules to tell."""

"""Captions written by a vision model: over an OpenAI-compatible endpoint, or by a model on this machine."""

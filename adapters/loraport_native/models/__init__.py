"""Ideogram 4: the transformer as trained, its checkpoint on disk, its text features and its latents."""

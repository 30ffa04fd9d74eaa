"""LoRA files: the one form every dialect is read into, its storage, and the proof that two of them mean the
same."""

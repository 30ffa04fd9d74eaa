"""The dialects: one way of writing LoRA keys each, how to tell it from the others, and where it keeps the scale."""

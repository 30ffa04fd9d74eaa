"""LoraPort's own trainer: an adapter like any other, whose backend is plain PyTorch."""

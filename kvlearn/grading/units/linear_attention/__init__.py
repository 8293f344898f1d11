"""The exercises on linear attention and its state."""

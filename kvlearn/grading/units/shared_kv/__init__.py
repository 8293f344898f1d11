"""The exercises on shared keys and values."""

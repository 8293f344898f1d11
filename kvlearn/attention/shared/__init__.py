"""Shared KV: fewer KV heads than query heads, and layers that read other layers' keys and values."""

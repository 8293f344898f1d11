"""Chapter 04: attention to the last W tokens, and a cache that stops growing."""

"""The exercises on the sliding window."""

"""The exercises on sparse attention."""

"""Chapter 06: a state of constant size in place of a cache that grows."""

"""Chapter 05: attention to some of the tokens, by a pattern or by what they say."""

"""Benchmarks that have not moved to kvlearn/bench yet."""

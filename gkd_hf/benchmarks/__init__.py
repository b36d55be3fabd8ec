"""What `scripts/benchmark_*.py` measure: pieces of the library against named references, in one process, in turn."""

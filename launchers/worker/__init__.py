"""One rank of a run, from its first line to its exit code."""

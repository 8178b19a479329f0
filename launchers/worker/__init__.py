"""One rank of a run, from its start to its exit code."""

"""A process and its environment: its rank, from the environment variables, and its exit code."""

"""What the environment tells a process: its rank among the others, and the exit codes that tell how it ended."""

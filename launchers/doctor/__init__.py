"""What this machine has, and what that changes for a run. Imports no torch: a process of its own does."""

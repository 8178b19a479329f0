"""Batch jobs: the script of a run, submitting and following it, and what happens to it on the cluster."""

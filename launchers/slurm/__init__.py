"""Batch jobs: the script of a run, submitting and following it, checking and replacing nodes."""

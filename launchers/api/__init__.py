"""`import trimaran`: what the command line does, as functions for scripts and notebooks. Imports no torch at first."""

"""Constants of a machine from what was measured on it, the file of both, and a step's time by them. No torch."""

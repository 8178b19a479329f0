"""Starts on this machine: the ranks through torchrun's API or mpirun, and the agent of one node among several."""

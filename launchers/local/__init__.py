"""The ranks of this machine, started through torchrun's API."""

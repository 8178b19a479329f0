"""What can be learned of a run without training it to the end: memory, and whether a parametrization carries over."""

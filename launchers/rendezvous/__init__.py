"""How the ranks of a start find each other, and check that they all have the same run."""

"""How the ranks of a start find each other, and check that they are about to do the same."""

"""How long a step takes: the model of its parts, the twelve constants, and where they come from."""

"""A search over fields of the run spec: what it tries, what came of it, and what to try next."""

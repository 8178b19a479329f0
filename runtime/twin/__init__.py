"""The digital twin: an author's texts, examples made of them, an index over them, and what the twin is worth."""

"""Finding passages for a question, and holding an answer to them: index, silence, prompt, citations, quotes."""

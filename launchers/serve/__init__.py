"""A model behind HTTP: OpenAI's API for it, and the ranks that it runs on."""

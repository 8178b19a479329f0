"""Keys and values that are kept for later tokens: of sequences one by one, or packed with common beginnings."""

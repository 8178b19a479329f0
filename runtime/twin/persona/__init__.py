"""From an author's passages to training examples: every answer is the author's own words, with their place."""

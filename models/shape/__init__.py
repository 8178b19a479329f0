"""What TransformerConfig says of a model: its fields, their values, and the rules between them. No torch."""

"""The sections of a recipe: what the data engine does with corpora before a run reads them."""

"""Published runs as tables, and how far plans lie from them."""

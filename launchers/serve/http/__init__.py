"""The HTTP side of `trimaran serve`: connections, their limits, who may use them, and what is counted."""

"""Laws of the loss over parameters and tokens: published ones, and those that are fitted to runs."""

"""Continuous batching: requests join and leave a batch at every token, at any layout."""

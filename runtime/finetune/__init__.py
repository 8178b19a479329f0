"""Learning from examples, preferences and rewards: records, chat templates, prepared examples and their batches."""

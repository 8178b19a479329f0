"""What several commands share: their options, help, errors and signals."""

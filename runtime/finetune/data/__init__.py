"""Examples: from files of records to packed rows of tokens."""

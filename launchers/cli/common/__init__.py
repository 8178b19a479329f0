"""What commands are made of beside their own words: options, help, output, errors and signals."""

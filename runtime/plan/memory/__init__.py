"""What a rank holds: this runtime's state and activations to the byte, other softwares' by their habits."""

"""What a run will cost and what it will be worth, told before it starts. Imports no torch."""

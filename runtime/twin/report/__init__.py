"""What a twin is worth: whose style its answers have, what it copies, and how surely that is known."""

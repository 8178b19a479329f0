"""What a run tells of itself while it trains: the screen, memory, the timeline of its pipeline."""

"""What gives a sampled answer its reward."""

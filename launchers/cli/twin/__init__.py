"""`trimaran twin`: an author's twin, from texts to a trained model."""

"""There and exactly back: source grid to network input and return."""

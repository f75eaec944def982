"""Data to plan: what to train, decided by rules."""

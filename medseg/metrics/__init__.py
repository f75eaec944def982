"""Numbers from two label maps."""

"""Objects: found, split, measured."""

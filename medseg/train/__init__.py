"""Dataset and plan to a trained bundle."""

"""Point at an object in a volume and get it whole: prompts, slices, propagation, sessions."""

"""From label maps and networks to objects: found, split, counted."""

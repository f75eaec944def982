"""Objects: from label maps, height maps and networks to instances, and what can be said of each."""

"""Files to Volume and back, and folders to datasets."""

"""Label map to label map, chosen by cross-validation."""

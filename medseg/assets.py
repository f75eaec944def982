"""Named, hashed downloads: weights, sample images and the viewer's script."""

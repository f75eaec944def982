"""Code of an exported MONAI bundle: copied into its ``scripts`` folder, where nothing needs medseg."""

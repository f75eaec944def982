"""Folders and zips from outside, read with every member checked first."""

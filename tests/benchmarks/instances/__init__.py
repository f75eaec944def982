"""What the shipped models that find objects reach on public images."""

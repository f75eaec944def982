"""Pure functions on grids: crop, resample, tile, orient."""

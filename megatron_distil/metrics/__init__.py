"""Numbers of a run: the catalogue of their names, sums that are divided once, and where they are written."""

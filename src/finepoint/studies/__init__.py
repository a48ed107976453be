"""Studies: grids of methods, rates, seeds and tasks, run and kept cell by cell."""

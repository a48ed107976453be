"""What the rest stands on: files, processes, progress, interruption, precision."""

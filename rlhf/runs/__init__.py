"""One training run: its folder, checkpoints, tracking, metrics and budget."""

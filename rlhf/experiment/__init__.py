"""Experiments: methods, swept values and run seeds, each its own program, measured alike."""

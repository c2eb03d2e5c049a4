"""Experiments: methods, strengths and run seeds, each its own program, measured alike."""

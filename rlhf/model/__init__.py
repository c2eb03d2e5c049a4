"""One language model: loading it, its adapters and their settings, passes over it."""

"""`rlhf chat` and `rlhf serve`: answers of trained policies. The core does not import it."""

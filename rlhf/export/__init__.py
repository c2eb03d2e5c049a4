"""`rlhf export`: write a trained policy for the programs that serve it. The core does not import it."""

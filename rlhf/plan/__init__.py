"""`rlhf plan`: memory, FLOPs, time and cost of a run, before weights are loaded."""

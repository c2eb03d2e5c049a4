"""Whether this machine can run the programs, and a configuration on it: `rlhf doctor`."""

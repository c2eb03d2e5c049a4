"""People compare two answers in a browser: `rlhf collect serve`."""

"""From a brand's specification to an adapter with a ship verdict: `rlhf brand run FILE`."""

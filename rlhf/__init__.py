"""RLHF with DeepSpeed: SFT, DPO and PPO on adapters of one base model, over one data module and one tracker."""

import os

# Threads that wait at a barrier sleep instead of spinning. Where other programs use the cores too, spinning makes a
# small model 15 to 20 times slower (docs/LOG.md). It has to be set before torch loads its OpenMP library.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = "0.1.0"

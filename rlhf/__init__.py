"""RLHF with DeepSpeed: SFT, DPO and PPO on adapters of one base model, over one data module and one
tracker.
"""

import os

# Threads that wait at a barrier spin for microseconds, then sleep. Where other programs use the
# cores too, spinning on makes a small model 5 to 20 times slower (docs/LOG.md). It has to be set
# before torch loads its OpenMP library.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

__version__ = "0.1.0"

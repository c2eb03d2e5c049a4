"""RLHF with DeepSpeed: SFT, DPO and PPO on adapters of one base model, over one data module and one tracker."""

__version__ = "0.1.0"

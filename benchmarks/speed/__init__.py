"""What `benchmarks/ppo_speed.py` measures, and with what: see its docstring."""

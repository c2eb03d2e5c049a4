"""The programs that train: `deepspeed launch/ppo.py` in a clone, `deepspeed --module launch.ppo`
anywhere.
"""

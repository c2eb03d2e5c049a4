"""The processes of a run: what they exchange, and a model and its optimizer divided among them.

Only `deepspeed_backend` imports DeepSpeed.
"""

"""PPO's roles: policy, reference, value and reward, on one frozen base or on whole weights."""

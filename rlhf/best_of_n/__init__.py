"""Best of n before RL: what optimising a reward model does to the score that counts, from one set of
samples. An optional package.
"""

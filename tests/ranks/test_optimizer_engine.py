"""The optimizer engine behind DeepSpeed, on one rank in a process of its own."""

import json
import os
import socket
import subprocess
import sys

import pytest

# two groups of weights, one step with gradients by hand, then one whose second group gets NaN
TWO_STEPS = """
import json, math, sys
import torch
from rlhf.ranks.distributed import start
from rlhf.ranks.optimizer_engine import make_engine
from rlhf.startup import silence_libraries

silence_libraries()
stage, dtype = int(sys.argv[1]), getattr(torch, sys.argv[2])
weights = torch.nn.ParameterList([torch.nn.Parameter(torch.zeros(1, dtype=dtype)) for _ in "abc"])
groups = [{"params": list(weights[:2]), "lr": 0.1}, {"params": list(weights[2:]), "lr": 0.1}]
world = start()
config = {"zero_optimization": {"stage": stage, "reduce_bucket_size": 1000}}
engine = make_engine(weights, groups, world, config)
for factor in (1.0, math.nan):
    a, b, c = engine.module
    engine.backward((3 * a + 4 * b + factor * 12 * c).float().sum(), last=True)
    norm = engine.step([0.1, 0.1])
    found = {"norm": norm, "groups": engine.group_norms}
    found["weights"] = [float(w) for w in engine.state_dict().values()]
    print("FOUND", json.dumps(found), flush=True)
world.stop_watching()
"""


def free_port() -> int:
    with socket.socket() as here:
        here.bind(("127.0.0.1", 0))
        return here.getsockname()[1]


@pytest.mark.parametrize(
    ("stage", "dtype"), [(0, "float32"), (1, "bfloat16"), (2, "bfloat16"), (2, "float32")]
)
def test_group_norms_of_a_step_that_is_not_finite_are_its_own(stage, dtype):
    # 3 a + 4 b has gradients 3 and 4, norm 5; 12 c has 12; jointly 13
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    environment = os.environ | ranks | {"MASTER_PORT": str(free_port()), "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-c", TWO_STEPS, str(stage), dtype]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    lines = [line[6:] for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    assert len(lines) == 2, done.stderr
    first, second = map(json.loads, lines)
    assert first["norm"] == pytest.approx(13) and first["groups"] == pytest.approx([5, 12])
    # the first group's, where it was measured before the step was dropped
    joined = [5.0, float("nan")] if dtype == "float32" else [float("nan")] * 2
    assert second["groups"] == pytest.approx(joined, nan_ok=True)
    assert second["weights"] == first["weights"]

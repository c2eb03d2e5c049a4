"""Several runs of the programs one after the other in the same ranks, which import everything once.

    deepspeed --num_accelerators 2 --no_local_rank tests/launch/many.py RUNS.json SEEN.json

RUNS.json is a list of {"program": name, "arguments": [...]}; SEEN.json, which the main rank writes, has
{"code": exit code, "said": text of an error, "cpu": seconds of this rank, "memory": GiB} for each.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import time
import traceback
from functools import partial
from pathlib import Path
from unittest.mock import patch

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)


def draw_evenly(model, prompt_ids, keys, sampling, *rest):
    """Sample responses that depend on their keys alone: every token of the vocabulary is as likely."""
    import torch

    from rlhf.engines.sampling import Completions, draw

    logits = torch.zeros(len(keys), model.config.get_text_config().vocab_size)
    columns = []
    for position in range(sampling.max_new_tokens):
        columns.append(draw(logits, torch.tensor(keys), position, sampling))
    ids, logprobs = (torch.stack(drawn, 1).tolist() for drawn in zip(*columns, strict=True))
    return Completions(ids, [False] * len(keys), logprobs)


def engine_of(usual, run, initial):
    """Return the usual engine of a run, but in bfloat16 one that draws from the noise alone: there a
    response of the model depends on the batch that it is sampled in.
    """
    return draw_evenly if run.config.dtype == "bfloat16" else usual(run, initial)


def run_one(program: str, arguments: list[str]) -> dict:
    """Return how a program ends, and what it says as an error."""
    import gc

    from accelerate.state import AcceleratorState, GradientState, PartialState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    from rlhf import stages
    from rlhf.program import on_failure
    from tests.launch.conftest import door

    began = time.process_time()
    said, code = io.StringIO(), 0
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stderr(said))
        if program == "ppo":
            engine = partial(engine_of, stages.sampling_engine)
            stack.enter_context(patch.object(stages, "sampling_engine", engine))
        try:
            door(program)(arguments)
        except SystemExit as ended:
            code = ended.code
        except Exception:
            code = 1
            traceback.print_exc()
    # what a process of its own would not inherit
    on_failure.clear()
    unset_hf_deepspeed_config()
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    gc.collect()
    return {"code": code, "said": said.getvalue(), "cpu": time.process_time() - began}


def main(runs: str, seen: str) -> None:
    from rlhf.ranks.distributed import start

    here = start()
    here.stop_watching()
    done = []
    for run in json.loads(Path(runs).read_text()):
        done.append(run_one(run["program"], run["arguments"]))
        ended = done[-1]
        if here.is_main:
            Path(seen).write_text(json.dumps(done, indent=1))
            print(f"{run['program']} {ended['code']} {ended['cpu']:.1f} s", flush=True)
        # one that failed by itself ends this process of all ranks
        if ended["code"] == 1:
            sys.exit(f"rank {here.rank}: {ended['said'][-4000:]}")


if __name__ == "__main__":
    main(*sys.argv[1:])

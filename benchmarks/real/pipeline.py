"""The whole path on a real model, SmolLM2-135M-Instruct, in the voice of configs/voices/outdoor.yaml:

    python -m benchmarks.real.pipeline            # make real: 3.5 hours on two cores that multiply bfloat16
    python -m benchmarks.real.pipeline --quick    # make real-quick: in miniature, under 20 minutes
    python -m benchmarks.real.pipeline --plan     # what each stage of make real costs; starts nothing
    python -m benchmarks.real.pipeline --page     # page and result rows of what is there; starts nothing

SFT, then `rlhf experiment run`: pairs sampled from the policy, simulated votes, reward models, DPO
and PPO, best of n, report. Ctrl-C or SIGTERM saves and ends; the same command goes on. At each end
docs/experiments/real.md and benchmarks/results/real.json are written of what is measured by then.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.paths import ROOT
from benchmarks.programs import fast_dtype, finished
from benchmarks.real import model, page, plan

EXPERIMENT = ROOT / "configs" / "experiments" / "real.yaml"
QUICK_EXPERIMENT = EXPERIMENT.with_name("real-quick.yaml")
SFT = ROOT / "configs" / "real" / "sft.yaml"
# SFT of the quick form: single answers alone, one pass
QUICK_SFT = (
    *("--data", "rlhf/brand_data/outdoor/answers.jsonl", "--max_prompt_length", "96"),
    *("--num_train_epochs", "1", "--eval_prompts", "8"),
)
# SFT runs alone, and takes all cores; programs of the experiment take one each
CORES = 2


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="the same in miniature")
    parser.add_argument("--plan", action="store_true", help="only say what make real costs")
    parser.add_argument("--page", action="store_true", help="only write the page of what is there")
    options = parser.parse_args(argv)
    # configs name files from here, and runs/ is made here
    os.chdir(ROOT)

    if options.plan:
        print("\n".join(plan.table(plan.planned())))
        return
    if options.quick:
        sys.exit(run_all(QUICK_EXPERIMENT, QUICK_SFT))
    code = 0 if options.page else run_all(EXPERIMENT)
    # also of what is measured when programs failed or were interrupted
    page.write(Path(settings(EXPERIMENT)["output_dir"]))
    sys.exit(code)


def run_all(experiment: Path, sft: Sequence[str] = ()) -> int:
    """Make what is missing of SFT, with these options more, and of the experiment.

    Returns the exit code of the last program: 0 where all is done.
    """
    folder = settings(experiment)["initial_policy"]
    if not finished(ROOT / folder):
        if "--model_name_or_path" not in sft:
            model.model_file()
        command = ["-m", "launch.sft", "--config", str(SFT), "--output_dir", folder, *sft]
        code = run(command, threads=CORES)
        if code:
            return code
    command = ["-m", "rlhf.cli", "experiment", "run", str(experiment)]
    return run([*command, *dtype_options(experiment)], threads=1)


def dtype_options(experiment: Path) -> list[str]:
    """Return `--dtype float32` where the CPUs do not multiply bfloat16; but an experiment that was
    begun keeps its dtype, so that its runs stay comparable.
    """
    begun = ROOT / settings(experiment)["output_dir"] / "experiment.yaml"
    if begun.is_file():
        return ["--dtype", settings(begun)["dtype"]]
    if fast_dtype() == "bfloat16":
        return []
    print("this CPU does not multiply bfloat16: all is computed in float32, which takes longer")
    return ["--dtype", "float32"]


def settings(experiment: Path) -> dict[str, Any]:
    return yaml.safe_load(experiment.read_text())


def run(words: Sequence[str], threads: int) -> int:
    """Run a Python program from the root of the repository to its end and return its exit code.

    A signal to this process is passed on: the program saves, ends, and its code is returned.
    """
    print(f"$ python {' '.join(words)}", flush=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    program = subprocess.Popen([sys.executable, *words], cwd=ROOT, env=environment)
    # Ctrl-C reaches the program by itself, since it shares the terminal
    before = {
        signal.SIGINT: signal.signal(signal.SIGINT, signal.SIG_IGN),
        signal.SIGTERM: signal.signal(signal.SIGTERM, lambda *_: program.terminate()),
    }
    try:
        return program.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    main()

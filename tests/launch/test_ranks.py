"""One rank or two, the same meaning; and a rank that fails ends the run with its own error."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf.ranks.distributed import DistributedContext
from rlhf.startup import free_port
from tests.conftest import ROOT, random_adapter
from tests.launch.conftest import SMALL, flags_of, ppo_flags
from tests.launch.ranks import equal_tokens, rollouts


def launch(
    program: Path, arguments: list[str], ranks: int = 2, cwd: str = "/"
) -> subprocess.CompletedProcess:
    command = [
        str(Path(sys.executable).parent / "deepspeed"),
        "--num_accelerators",
        str(ranks),
        "--no_local_rank",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command += ["--master_port", str(free_port()), str(program), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=900
    )


# settings of ZeRO that no shipped file has
OWN = {
    "offload": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    "1 overlaps": {"stage": 1, "overlap_comm": True},
}


@pytest.fixture(scope="module")
def start_path(base_path, tmp_path_factory) -> str:
    """An SFT adapter with more than LoRA in it: norms and the row of a token."""
    more = {"modules_to_save": ["norm"], "trainable_token_indices": [2]}
    return random_adapter(base_path, tmp_path_factory.mktemp("start"), seed=1, **more)


@pytest.fixture(scope="module")
def alone(base_path, start_path, member_paths):
    return rollouts(base_path, start_path, member_paths, DistributedContext(), None)


@pytest.mark.parametrize(
    "stage",
    [
        "zero2",
        *(
            pytest.param(s, marks=pytest.mark.slow)
            for s in ("zero0", "zero3", "zero3 layers", *OWN)
        ),
    ],
)
def test_two_ranks_mean_what_one_means(stage, alone, base_path, start_path, member_paths, tmp_path):
    """Seven responses in minibatches of four and three: ranks have uneven shares, and one of them
    sometimes none.
    """
    out, settings = tmp_path / "seen.json", stage
    if stage in OWN:
        settings = str(tmp_path / "offload.json")
        Path(settings).write_text(json.dumps({"zero_optimization": OWN[stage]}))
    done = launch(
        ROOT / "tests/launch/ranks.py",
        [base_path, start_path, ",".join(member_paths), str(out), *settings.split()],
    )
    assert done.returncode == 0, done.stderr[-3000:]
    means_the_same(json.loads(out.read_text()), alone, stage)


@pytest.mark.slow
def test_two_ranks_on_a_packed_base_mean_what_one_means(
    base_path, start_path, reward_path, tmp_path
):
    """In 4 bits, with moments in 8: those of two ranks are of other blocks, in later steps."""
    pytest.importorskip("bitsandbytes")
    out = tmp_path / "seen.json"
    given = [base_path, start_path]
    done = launch(
        ROOT / "tests/launch/ranks.py", [*given, reward_path, str(out), "zero2", "packed"]
    )
    assert done.returncode == 0, done.stderr[-3000:]
    alone = rollouts(*given, [reward_path], DistributedContext(), None, "packed")
    means_the_same(json.loads(out.read_text()), alone, "zero2, packed")


def means_the_same(both: dict, alone: dict, stage: str) -> None:
    first, plain = both["steps"][0], alone["steps"][0]
    assert first["responses"] == plain["responses"]
    for name, value in plain["metrics"].items():
        tolerance = 1e-5 if not name.startswith(("value/", "rollout/")) else 1e-4
        assert first["metrics"][name] == pytest.approx(value, rel=tolerance, abs=1e-6), name
    later = [
        equal_tokens(ours["responses"], theirs["responses"])
        for ours, theirs in zip(both["steps"][1:], alone["steps"][1:], strict=True)
    ]
    print(
        f"{stage}: share of equal tokens in rollouts 2 to {len(later) + 1}: {', '.join(f'{s:.3f}' for s in later)}"
    )
    assert min(later) > 0.5
    assert both["episodes"] == alone["episodes"] == 7 * len(alone["steps"])  # nothing counted twice
    assert [s["gathers"] for s in both["steps"]] == [1, 2, 3, 4]  # once a rollout, for generation
    assert (
        both["shapes"] == alone["shapes"]
        and [1, 32] in both["shapes"]["value/value_head.safetensors"].values()
    )


# a loss that rises at once; and what the policy samples after one step
RISES = ["--learning_rate", "0.5", "--guards", "{divergence: {window: 1, threshold: 1.01}}"]
PLANTED = {
    "sft": RISES,
    "reward": RISES,
    "dpo": ["--learning_rate", "0.05", "--eval_steps", "1", "--guards", "{max_kl: 0.001}"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANTED)
def test_a_guard_of_trls_programs_stops_both_ranks(name, base_path, files, tmp_path):
    """A rank that went on alone would wait for the other, and end as one that hangs."""
    data = files["instructions" if name == "sft" else "pairs"]
    flags = [*flags_of(name, base_path, data, tmp_path / "run"), *SMALL, "--hang_timeout", "60"]
    done = launch(ROOT / "launch" / f"{name}.py", [*flags, *PLANTED[name]])
    said = done.stdout + done.stderr
    assert f"{name}: stopped by guard" in said and "hangs" not in said, said[-3000:]
    stopped = json.loads((tmp_path / "run" / "result.json").read_text())["stopped"]
    assert stopped.startswith("guard max_kl" if name == "dpo" else "guard divergence"), stopped


def test_a_rank_that_fails_ends_the_run_with_its_own_error_on_top(runs, files, tmp_path):
    (tmp_path / "mine.py").write_text(
        "import os\n"
        "calls = []\n"
        "def score(samples):\n"
        "    calls.append(1)\n"
        # evaluation at step 0, first rollout, then this
        "    if os.environ['RANK'] == '1' and len(calls) == 3:\n"
        "        raise RuntimeError('the scorer has lost its mind')\n"
        "    return [float(len(t)) for t in samples.responses]\n"
    )
    flags = [*flags_of("ppo", runs / "sft", files["pairs"], tmp_path / "run"), *ppo_flags(runs)]
    done = launch(
        ROOT / "launch" / "ppo.py",
        [*flags, "--reward", "[{function: 'mine:score'}]"],
        cwd=str(tmp_path),
    )
    assert done.returncode != 0
    # nor is memory left behind where ranks are ended
    port = done.args[done.args.index("--master_port") + 1]
    assert not list(Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"))
    said = done.stderr + done.stdout
    assert (
        said.index("the scorer has lost its mind") >= 0 and "raised inside scorer 'score'" in said
    )
    assert said.count("Traceback") == 1, said[-6000:]
    assert "rank 0 ends, because rank 1 has failed" in said


def test_a_fixed_option_is_refused_by_all_ranks(runs, files, tmp_path):
    """The main rank alone looks for a checkpoint; the others have to hear what it found wrong."""
    import shutil

    shutil.copytree(runs / "ppo", tmp_path / "run")
    # as if it had been cut off, by one rank that was not launched
    (tmp_path / "run" / "result.json").unlink()
    flags = ["--config", str(runs / "ppo" / "config.yaml"), "--output_dir", str(tmp_path / "run")]
    done = launch(ROOT / "launch" / "ppo.py", flags)
    assert done.returncode == 2, done.stderr[-2000:]
    assert "made by 1 rank(s) without a launcher, and now there are 2" in done.stderr
    assert "Traceback" not in done.stderr and "frame #" not in done.stderr, done.stderr[-3000:]


def test_a_nan_score_on_one_rank_is_named_by_all(runs, files, tmp_path):
    (tmp_path / "mine.py").write_text(
        "import os\n"
        "def score(samples):\n"
        "    return [float('nan') if os.environ['RANK'] == '1' and i == 1 else 1.0 for i in range(len(samples))]\n"
    )
    flags = [
        *flags_of("ppo", runs / "sft", files["pairs"], tmp_path / "run"),
        *ppo_flags(runs),
        "--eval_prompts",
        "0",
    ]
    more = ["--reward", "[{function: 'mine:score'}]", "--guards", "{not_finite: stop}"]
    done = launch(ROOT / "launch" / "ppo.py", [*flags, *more], cwd=str(tmp_path))
    assert done.returncode == 2, done.stderr[-2000:]
    assert "scorer 'score' returned nan" in done.stderr and "prompt:" in done.stderr
    assert "Traceback" not in done.stderr

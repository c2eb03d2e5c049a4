"""What does a base in 4 or 8 bits cost and save on a real model, and 8-bit AdamW?

    python -m benchmarks.real.qlora          # about 12 CPU minutes on one thread; goes on where it was stopped
    python -m benchmarks.real.qlora page     # the page and the rows from what was measured

SmolLM2-135M-Instruct (`benchmarks/real/model.py`) learns the shipped customer-service answers: LoRA
of rank 16 on all linear layers, batches of 8, the same rows and start for all. A sitting of eight
steps is a process of its own, which goes on from the last one's checkpoint, and the kinds take
turns sitting by sitting. Then PPO updates of 8 responses, in turn too. Seconds are those of the CPU
(`time.process_time`) on one thread; memory is the peak resident set, of loading and of what follows
(reset between both). Pieces: benchmarks/.cache/qlora/*.json, written as they are measured.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.paths import CACHE, RESULTS, ROOT

PIECES = CACHE / "qlora"
ANSWERS = ROOT / "rlhf" / "brand_data" / "outdoor" / "answers.jsonl"
PAGE = RESULTS / "2026-11-29-qlora.md"
# how the base is kept, and AdamW
KINDS = [
    ("whole", "adamw"),
    ("int8", "adamw"),
    ("nf4", "adamw"),
    ("nf4", "adamw_8bit"),
]
NAMES = {"whole": "float32", "int8": "8 bits", "nf4": "4 bits (NF4)"}
SITTINGS, STEPS, BATCH, HELD_OUT, RATE = 2, 8, 8, 16, 1e-3
PPO_KINDS, PPO_TURNS = ("whole", "nf4"), 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="?", default="all", choices=["all", "page", "sft", "ppo"])
    parser.add_argument("piece", nargs="*", help="of one process: base, optimizer or turn, sitting")
    parser.add_argument("--model", help="a folder of weights; default: SmolLM2-135M-Instruct")
    given = parser.parse_args()
    if given.what == "sft":
        sft_sitting(given.piece[0], given.piece[1], int(given.piece[2]), given.model)
    elif given.what == "ppo":
        ppo_update(given.piece[0], int(given.piece[1]), given.model)
    else:
        if given.what == "all":
            measure(given.model)
        write_page()


def measure(model: str | None) -> None:
    """Measure the pieces that are not there, in turn, each in a process of its own."""
    PIECES.mkdir(parents=True, exist_ok=True)
    tasks = [
        ("sft", base, optim, str(sitting)) for sitting in range(SITTINGS) for base, optim in KINDS
    ]
    tasks += [("ppo", base, str(turn)) for turn in range(PPO_TURNS) for base in PPO_KINDS]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for number, task in enumerate(tasks, 1):
        if (PIECES / f"{'-'.join(task)}.json").is_file():
            continue
        print(f"{number} of {len(tasks)}: {' '.join(task)}", flush=True)
        command = [sys.executable, "-m", "benchmarks.real.qlora", *task]
        command += ["--model", model] if model else []
        subprocess.run(command, check=True, env=environment)


def loaded(base: str, model: str | None):
    """Return the model with its base kept as asked, and the bytes and peak of loading it."""
    import torch

    from benchmarks.real.model import model_file
    from rlhf.model.from_gguf import as_folder
    from rlhf.model.loading import load_model
    from rlhf.model.quantized import weight_memory
    from rlhf.startup import silence_libraries

    silence_libraries()
    torch.set_num_threads(1)
    folder = model or as_folder(model_file())
    initial = load_model(folder, quantization=None if base == "whole" else base)
    found = {"weights": weight_memory(initial.model)[0], "loading": peak()}
    # from here on the peak is that of what follows
    Path("/proc/self/clear_refs").write_text("5")
    return initial, found


def peak() -> int:
    """Return the peak of this process's resident set since it was reset, bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def rows_of(tokenizer) -> tuple[list[dict], list[dict]]:
    """Return training rows in the order of the seed, and held-out ones."""
    import random

    from rlhf.data.encode import encode
    from rlhf.data.load import load
    from rlhf.data.records import Instruction

    rows, _ = encode(load([str(ANSWERS)], Instruction), tokenizer, 256, 128)
    random.Random(0).shuffle(rows)
    return rows[HELD_OUT:], rows[:HELD_OUT]


def loss_of(model, rows, pad_id: int, count: int):
    """Return the negative log-likelihood of the rows' response tokens over a count of tokens."""
    from rlhf.model.logprobs import completion_batch, response_logprobs

    columns = completion_batch(
        [row["prompt_ids"] for row in rows], [row["response_ids"] for row in rows], pad_id
    )
    logprobs, _ = response_logprobs(model, *columns)
    return -logprobs.sum() / count


def held_out_loss(model, rows, pad_id: int) -> float:
    """Return the mean negative log-likelihood of the response tokens, nats."""
    import torch

    count = sum(len(row["response_ids"]) for row in rows)
    with torch.no_grad():
        parts = [loss_of(model, rows[i : i + 8], pad_id, count) for i in range(0, len(rows), 8)]
    return float(sum(parts))


def sft_sitting(base: str, optim: str, sitting: int, path: str | None) -> None:
    """Make eight steps of SFT, from where the last sitting ended."""
    import torch

    from rlhf.model.adapters import lora_config
    from rlhf.model.loading import trainable_policy
    from rlhf.ranks.distributed import DistributedContext
    from rlhf.ranks.optimizer_engine import make_engine

    initial, found = loaded(base, path)
    pad_id = initial.tokenizer.pad_token_id
    rows, held_out = rows_of(initial.tokenizer)
    torch.manual_seed(0)
    model = trainable_policy(initial, lora_config(r=16, alpha=32)).train()
    learnt = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": learnt, "lr": RATE}]
    engine = make_engine(model, groups, DistributedContext(), optim=optim)
    if sitting:
        engine.load(PIECES / f"{base}-{optim}" / str(sitting - 1))
    else:
        found["loss_before"] = held_out_loss(model, held_out, pad_id)

    seconds, losses = [], []
    for step in range(sitting * STEPS, (sitting + 1) * STEPS):
        began = time.process_time()
        batch = rows[step * BATCH : (step + 1) * BATCH]
        loss = loss_of(model, batch, pad_id, sum(len(row["response_ids"]) for row in batch))
        engine.backward(loss, last=True)
        engine.step([RATE])
        seconds.append(time.process_time() - began)
        losses.append(float(loss.detach()))
    folder = PIECES / f"{base}-{optim}" / str(sitting)
    engine.save(folder)
    found |= {"seconds": seconds, "losses": losses, "training": peak()}
    found["checkpoint"] = (folder / "plain.pt").stat().st_size
    found["moments"] = moment_bytes(engine.optimizer)
    if sitting == SITTINGS - 1:
        found["loss_after"] = held_out_loss(model, held_out, pad_id)
    write_piece(f"sft-{base}-{optim}-{sitting}", found)


def moment_bytes(optimizer) -> int:
    """Return the bytes of an optimizer's state."""
    tensors = []
    for state in optimizer.state.values():
        # the tables of 256 levels are shared by all
        tensors += [v for name, v in state.items() if hasattr(v, "numel") and "qmap" not in name]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def ppo_update(base: str, turn: int, path: str | None) -> None:
    """Make one PPO update of 8 responses, scored by their distinct tokens, with a critic of its own."""
    import torch

    from rlhf.data.records import Prompt, Scores
    from rlhf.model.adapters import lora_config
    from rlhf.model.tokenizer import stop_ids
    from rlhf.options.ppo import PPOConfig
    from rlhf.ppo.batches import TrainingData
    from rlhf.ppo.trainer import PPOTrainer
    from rlhf.ranks.distributed import DistributedContext
    from rlhf.roles.one_base import Roles

    initial, found = loaded(base, path)
    rows, _ = rows_of(initial.tokenizer)
    prompts = [
        {"prompt_ids": row["prompt_ids"], "record": Prompt(prompt=row["record"].prompt)}
        for row in rows[:8]
    ]
    options = PPOConfig(
        model_name_or_path="x", data=["x"], output_dir="x", reward=[{"rule": "distinct"}], rollout_batch_size=8,
        total_episodes=8, max_response_length=32, num_ppo_epochs=1, critic_trunk="own",
        missing_eos_score=None,
    )  # fmt: skip
    torch.manual_seed(0)
    roles = Roles(initial, lora_config(r=16, alpha=32))
    data = TrainingData(prompts, initial.tokenizer, stop_ids(initial.tokenizer, initial.model))

    def score(samples) -> Scores:
        return Scores([float(len(set(ids))) for ids in samples.response_ids], {})

    trainer = PPOTrainer(options, roles, score, data, DistributedContext())
    marks = [time.process_time()]
    collect = trainer.collect

    def collect_and_mark(step: int):
        rollout = collect(step)
        marks.append(time.process_time())
        return rollout

    trainer.collect = collect_and_mark
    metrics, rollout = trainer.step(0)
    marks.append(time.process_time())
    found |= {"collect": marks[1] - marks[0], "learn": marks[2] - marks[1], "training": peak()}
    found |= {"tokens": int(rollout.mask.sum()), "kl": metrics["kl/sequence"]}
    found |= {name: metrics[name] for name in ("ppo/ratio_first", "rollout/logprob_gap")}
    write_piece(f"ppo-{base}-{turn}", found)


def write_piece(name: str, found: dict) -> None:
    from rlhf.files import write_atomic

    write_atomic(PIECES / f"{name}.json", json.dumps(found, indent=1) + "\n")


# the page


def pieces(pattern: str) -> list[dict]:
    return [json.loads(file.read_text()) for file in sorted(PIECES.glob(f"{pattern}.json"))]


def ratios(own: list[float], base: list[float]) -> tuple[float, float, float]:
    """Return the median and the range of ratios of seconds that were measured in turn."""
    found = [a / b for a, b in zip(own, base, strict=True)]
    return statistics.median(found), min(found), max(found)


def sittings_of(base: str, optim: str) -> list[dict]:
    return pieces(f"sft-{base}-{optim}-[0-9]")


def seconds_of(sittings: list[dict]) -> list[float]:
    """Return the seconds of a step of each sitting: the median, without the first of the process."""
    return [statistics.median(sitting["seconds"][1:]) for sitting in sittings]


def write_page() -> None:
    """Write the page and the rows of results from the pieces."""
    from benchmarks.result_rows import add_rows, made_with
    from rlhf.text import markdown_table

    whole = sittings_of("whole", "adamw")
    if len(whole) < SITTINGS:
        raise SystemExit(f"{PIECES}: {len(whole)} of {SITTINGS} sittings; measure them first")
    table, rows = [], []
    for base, optim in KINDS:
        own = sittings_of(base, optim)
        ratio = ratios(seconds_of(own), seconds_of(whole))
        table.append(
            [
                f"{NAMES[base]}, {optim}",
                f"{own[0]['loss_before']:.4f}",
                f"{own[-1]['loss_after']:.4f}",
                f"{statistics.median(seconds_of(own)):.2f}",
                f"{ratio[0]:.2f} ({ratio[1]:.2f} to {ratio[2]:.2f})",
                f"{own[0]['weights'] / 2**20:.0f}",
                f"{own[-1]['loading'] / 2**20:.0f}",
                f"{own[-1]['training'] / 2**20:.0f}",
                f"{own[-1]['moments'] / 2**20:.1f}",
                f"{own[-1]['checkpoint'] / 2**20:.1f}",
            ]
        )
    header = [
        "base, optimizer", "loss before", "after 16 steps", "s a step", "times float32", "weights MiB",
        "peak of loading", "peak of training", "moments MiB", "checkpoint MiB",
    ]  # fmt: skip
    ppo_table = []
    ppo = {base: pieces(f"ppo-{base}-[0-9]") for base in PPO_KINDS}
    for base, own in ppo.items():
        cells = [NAMES[base]]
        for phase in ("collect", "learn"):
            seconds = [turn[phase] for turn in own]
            ratio = ratios(seconds, [turn[phase] for turn in ppo["whole"]])
            cells += [
                f"{statistics.median(seconds):.1f}",
                f"{ratio[0]:.2f} ({ratio[1]:.2f} to {ratio[2]:.2f})",
            ]
        cells += [f"{max(turn['training'] for turn in own) / 2**20:.0f}"]
        cells += [str(own[0]["tokens"]), f"{own[0]['kl']:g}", f"{own[0]['ppo/ratio_first']:.6f}"]
        cells += [f"{own[0]['rollout/logprob_gap']:.1g}"]
        ppo_table.append(cells)
    ppo_header = [
        "base", "collect s", "times float32", "learn s", "times float32", "peak MiB", "tokens", "KL", "first ratio",
        "engine's gap, nats",
    ]  # fmt: skip

    nf4 = sittings_of("nf4", "adamw")
    slower = ratios(seconds_of(nf4), seconds_of(whole))[0]
    sampled = ratios(*([t["collect"] for t in ppo[b]] for b in ("nf4", "whole")))[0]
    command = "python -m benchmarks.real.qlora"
    loss_gap = nf4[-1]["loss_after"] - whole[-1]["loss_after"]
    share = nf4[0]["weights"] / whole[0]["weights"]
    eight = sittings_of("nf4", "adamw_8bit")[-1]
    moved = abs(eight["loss_after"] - nf4[-1]["loss_after"])
    before = nf4[0]["loss_before"] - whole[0]["loss_before"]
    loss_8 = sittings_of("int8", "adamw")[-1]["loss_after"] - whole[-1]["loss_after"]
    saved = (whole[-1]["training"] - nf4[-1]["training"]) / 2**20
    moments = [own["moments"] / 2**20 for own in (nf4[-1], eight)]
    for name, what, value, bound in (
        ("qlora-loss", "held-out loss after 16 steps on a 4-bit base less that on float32, nats", loss_gap, "<= 0.1"),
        ("qlora-weights", "bytes of the 4-bit base over those of float32", share, "<= 0.4"),
        ("qlora-step-time", "CPU seconds of an SFT step on a 4-bit base over float32", slower, "<= 1.5"),
        ("qlora-collect-time", "CPU seconds of collecting 8 responses on a 4-bit base over float32", sampled, "<= 2"),
        ("qlora-kl", "KL of PPO's policy to its reference at the start, 4-bit base", ppo["nf4"][0]["kl"], "== 0"),
        ("adam8bit-loss", "held-out loss with 8-bit AdamW less that with AdamW, absolute, nats", moved, "<= 0.01"),
    ):  # fmt: skip
        rows.append({"id": name, "what": what, "value": value, "bound": bound, "command": command})
    add_rows(RESULTS / "real.json", rows)

    findings = [
        f"- On a CPU a 4-bit base is slower: {slower:.2f} times the seconds of an SFT step, where a weight is "
        f"unpacked for hundreds of tokens, and {sampled:.1f} times those of collecting, where it is unpacked for "
        "each token of 8 rows and nothing is merged. What it saves is memory.",
        f"- The weights take {share:.0%} of float32: embeddings and head, a fifth of this model, stay whole. The "
        f"peak of training falls by {saved:.0f} MiB; the rest of it is activations and Python. Loading takes "
        "more, not less: packing has the whole weights beside it.",
        f"- Rounding costs {before:.2f} nats before training and {loss_gap:.2f} after 16 steps; in 8 bits "
        f"{loss_8:.3f} after them.",
        f"- 8-bit AdamW changes the loss by {moved:.4f} and the moments from {moments[0]:.1f} to "
        f"{moments[1]:.1f} MiB.",
    ]
    text = [
        "# A base in 4 and 8 bits, and 8-bit AdamW, on SmolLM2-135M", "", __doc__.split("\n\n")[2].replace("\n", " "),
        "", f"`{command}`", "", made_with("transformers", "trl", "bitsandbytes"), "", "## SFT, 16 steps of 8 rows", "",
        *markdown_table(header, table, right=range(1, len(header))), "",
        f"Loss: mean over the response tokens of {HELD_OUT} held-out answers, nats. Seconds: of a step, the "
        "median over sittings; ratios sitting by sitting, with their range. Peaks: MiB of resident memory with "
        "Python and its libraries.",
        "", "## One PPO update of 8 responses, one epoch, a critic of its own", "",
        *markdown_table(ppo_header, ppo_table, right=range(1, len(ppo_header))), "",
        "Collect: sampling, scoring and measuring. Learn: the updates.", "", "## What it shows", "",
        *findings, "",
    ]  # fmt: skip
    PAGE.write_text("\n".join(text), encoding="utf-8")
    print(PAGE)


if __name__ == "__main__":
    main()

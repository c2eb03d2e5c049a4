"""Two brands on one base: each adapter is to be best at its own voice, by held-out prompts.

    python benchmarks/two_brands.py --out runs/two-brands        # resumes; writes rows and the page

Both are trained by `rlhf brand run` with the same options on the sandbox; only the voice differs.
Each adapter's answers to the test prompts, and the base's, are scored by both voices.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.result_rows import add_rows, made_with  # noqa: E402
from reward.compose import build_scorer  # noqa: E402
from rlhf.brand.answers import Scored, by_group, difference, scored_answers  # noqa: E402
from rlhf.brand.gates import Measured, mean_of_groups, shown  # noqa: E402
from rlhf.data.store import Store  # noqa: E402
from rlhf.text import markdown_table  # noqa: E402

CONFIGS = ROOT / "rlhf" / "sandbox" / "configs"
VOICES = {"fernhill": CONFIGS / "voice.yaml", "street": CONFIGS / "street.yaml"}
RESULTS = ROOT / "benchmarks" / "results"
PAGE = RESULTS / "2026-11-29-two-brands.md"
COMMAND = "python benchmarks/two_brands.py"
TRAIN = {
    "beta": 0.2,
    "num_train_epochs": 2,
    "per_device_train_batch_size": 32,
    "learning_rate": 1e-3,
    "warmup_steps": 5,
    "deepspeed": "zero0",
}


def run_brands(out: Path) -> None:
    """Build the world and run both brands; what is done is not done again."""
    world = out / "world"
    command = [sys.executable, "-m", "rlhf.cli"]
    build = ["sandbox", "build", "--output_dir", str(world), "--n_prompts", "1000"]
    subprocess.run([*command, *build, "--n_instructions", "50"], check=True, cwd=ROOT)
    train = out / "train.yaml"
    train.write_text(yaml.safe_dump(TRAIN))
    for name, voice in VOICES.items():
        options = {
            "voice": str(voice),
            "model_name_or_path": str(world / "base"),
            "output_dir": str(out / name),
            "prompts": [str(world / "prompts.jsonl")],
            "n_prompts": 800,
            "train": {"config": str(train)},
            "votes": "simulated",
            "votes_per_pair": 3,
            "texts": [str(world / "held_out.jsonl")],
            "task": [str(world / "short.jsonl")],
            "max_prompt_length": 64,
            "max_response_length": 48,
            "batch_size": 256,
        }
        file = out / f"{name}.yaml"
        file.write_text(yaml.safe_dump(options, sort_keys=False))
        subprocess.run([*command, "brand", "run", str(file)], check=True, cwd=ROOT)


def answers_by_voice(out: Path) -> dict[str, dict[str, list[Scored]]]:
    """Return voice -> policy ("base" and each adapter) -> its answers, scored by the voice."""
    found = {}
    for voice, file in VOICES.items():
        scorer = build_scorer([{"voice": str(file)}])
        own = found[voice] = {}
        for name in VOICES:
            with Store.open(out / name / "ab.db", readonly=True) as store:
                scored = scored_answers(store.at(), scorer)
            own["base"] = scored[str(out / "world" / "base")]
            own[name] = scored[str(out / name / "dpo")]
    return found


def advantages(scores: dict[str, dict[str, list[Scored]]]) -> dict[str, Measured]:
    """Return voice -> its own adapter's score minus the other's, by the voice, on the same prompts."""
    found = {}
    for voice, own in scores.items():
        (other,) = set(own) - {"base", voice}
        found[voice] = difference(by_group(own[other], own[voice], lambda answer: answer.score))
    return found


def page(scores: dict[str, dict[str, list[Scored]]], verdicts: dict[str, dict]) -> list[str]:
    """Return the lines of the results page."""
    header = ["answers of", *(f"score by {voice}" for voice in scores)]
    rows = []
    for policy in ("base", *VOICES):
        cells = []
        for own in scores.values():
            cells.append(shown(mean_of_groups([(a.group, a.score) for a in own[policy]])))
        rows.append([policy, *cells])
    lines = [
        "# Two brands on one base",
        "",
        f"`{COMMAND}`: two adapters of the sandbox's base, trained by `rlhf brand run` with the same options. "
        "`fernhill` is the shop's own voice, `street` asks for much of what that avoids. Means over test prompts with "
        "95 % intervals. " + made_with("transformers", "trl"),
        "",
        *markdown_table(header, rows, right=[1, 2]),
        "",
        "On the same prompts, the own adapter's score minus the other's:",
        "",
    ]
    for voice, found in advantages(scores).items():
        lines.append(f"- by {voice}: {shown(found)}, {found.groups} prompts")
    lines += ["", "The verdicts:", ""]
    for name, verdict in verdicts.items():
        blocking = [
            gate["sentence"]
            for gate in verdict["gates"]
            if gate["status"] in ("failed", "not shown")
        ]
        lines.append(f"- {name}: {' '.join([verdict['verdict'], *blocking])}")
    return lines


def rows_of(advantage: dict[str, Measured], verdicts: dict[str, dict]) -> list[dict]:
    """Return the rows of benchmarks/results/brand.json."""
    rows = []
    for voice, found in advantage.items():
        rows.append(
            {
                "id": f"two-brands-{voice}",
                "what": f"two adapters on the sandbox's base: score by the voice {voice} of its own adapter minus the "
                f"other's, lower end of the 95 % interval over {found.groups} held-out prompts (estimate "
                f"{found.estimate:.3f})",
                "value": round(found.low, 4),
                "bound": "> 0",
                "command": COMMAND,
            }
        )
    for name, verdict in verdicts.items():
        rows.append(
            {
                "id": f"two-brands-ships-{name}",
                "what": f"the verdict of rlhf brand run for the voice {name} on the sandbox: {verdict['verdict']}",
                "value": verdict["ship"],
                "bound": "== True",
                "command": COMMAND,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", default="runs/two-brands")
    out = Path(parser.parse_args().out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    run_brands(out)
    scores = answers_by_voice(out)
    verdicts = {name: json.loads((out / name / "verdict.json").read_text()) for name in VOICES}
    lines = page(scores, verdicts)
    PAGE.write_text("\n".join(lines) + "\n", encoding="utf-8")
    add_rows(RESULTS / "brand.json", rows_of(advantages(scores), verdicts))
    print("\n".join(lines))


if __name__ == "__main__":
    main()

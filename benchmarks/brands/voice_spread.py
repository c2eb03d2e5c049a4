"""How the answers of a model that knows nothing of a brand spread under its voice, with and without
partial credit.

python -m benchmarks.brands.voice_spread MODEL    samples the answers, two to each of seven questions
python -m benchmarks.brands.voice_spread          scores those of benchmarks/results
"""

import itertools
import json
import random
import sys
import time
from pathlib import Path

import torch

from benchmarks.paths import RESULTS
from benchmarks.result_rows import add_rows
from reward.voice.answers import Answer, sample_answers
from reward.voice.check import spread
from reward.voice.scorer import Voice, load_voice
from rlhf.files import write_atomic
from rlhf.sandbox import SHOP_VOICE
from rlhf.sandbox.corpus import FAULTS, answer, draw_case, make_world
from rlhf.values import read_yaml

BAKERY = Path(__file__).parent / "bakery"
TEMPERATURES = (1.0, 0.7)
COMMAND = "python -m benchmarks.brands.voice_spread"


def answers_file(temperature: float) -> Path:
    """Return the file with the answers that were sampled at a temperature."""
    return RESULTS / f"2026-11-29-voice-spread-t{temperature:g}.jsonl"


def sample(model: str, temperature: float) -> None:
    """Write two answers of the model to each question."""
    torch.set_num_threads(1)
    start = time.process_time()
    answers = sample_answers(
        model,
        [str(BAKERY / "questions.jsonl")],
        prompts=7,
        samples_per_prompt=2,
        temperature=temperature,
        max_prompt_length=128,
        max_response_length=160,
        seed=0,
    )
    lines = []
    for own in answers:
        row = {"prompt": own.prompt, "response": own.text, "metadata": {"ended": own.ended}}
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    write_atomic(answers_file(temperature), "".join(lines))
    print(f"{len(answers)} answers in {time.process_time() - start:.0f} CPU seconds")


def read_answers(temperature: float) -> list[Answer]:
    """Return the answers that were sampled, with whether they ended."""
    lines = answers_file(temperature).read_text(encoding="utf-8").splitlines()
    rows = map(json.loads, lines)
    return [Answer(row["response"], row["prompt"], ended=row["metadata"]["ended"]) for row in rows]


def sandbox_scores(count: int = 400) -> tuple[list[float], list[float], float]:
    """Return the totals of sandbox answers with faults, exact and partial, and the ratio of their
    CPU time (partial to exact, the median of seven rounds in turn).
    """
    exact = load_voice(SHOP_VOICE)
    partial = exact.model_copy(update={"credit": "partial"})
    world = make_world(0, n_items=40, n_intents=12)
    rng = random.Random(7)
    texts = []
    for _ in range(count):
        case = draw_case(world, rng)
        faults = rng.sample(list(FAULTS), rng.randrange(4))
        texts.append((answer(world, case, faults, rng), case.metadata))

    def totals(voice: Voice) -> list[float]:
        return [voice.score(text, metadata)["total"] for text, metadata in texts]

    # patterns are compiled once
    found = totals(exact), totals(partial)
    ratios = []
    for _ in range(7):
        seconds = []
        for voice in (exact, partial):
            start = time.process_time()
            totals(voice)
            seconds.append(time.process_time() - start)
        ratios.append(seconds[1] / seconds[0])
    print("CPU time, partial to exact:", " ".join(f"{ratio:.2f}" for ratio in sorted(ratios)))
    return *found, sorted(ratios)[3]


def concordance(one: list[float], other: list[float]) -> float:
    """Return the share of pairs that `other` orders as `one` does, of those that `one` orders."""
    agreed = ordered = 0
    for a, b in itertools.combinations(range(len(one)), 2):
        if one[a] != one[b]:
            ordered += 1
            agreed += (one[a] > one[b]) == (other[a] > other[b]) and other[a] != other[b]
    return agreed / ordered


def phrases_only() -> Voice:
    """Return the bakery's voice with nothing but what looks for phrases: a short first specification."""
    given = read_yaml(BAKERY / "voice.yaml")
    kept = {name: given[name] for name in ("name", "greeting", "closing", "use", "avoid", "claims")}
    return Voice.model_validate(kept)


def spread_rows(voice: Voice, name: str, temperature: float) -> list[dict]:
    """Print the spread of the answers under a voice, and return its rows."""
    found = spread(voice, read_answers(temperature))
    print(f"{name}, temperature {temperature:g}")
    for credit in ("exact", "partial"):
        own = found[credit]
        print(
            f"  {credit}: {own['distinct']} distinct scores of {found['answers']}, {own['ties']} of "
            f"{found['pairs']} pairs tie, {own['low']:.3f} to {own['high']:.3f}"
        )
    for part, own in found["parts"].items():
        print(f"    {part:<14} mean {own['mean']:.3f}, {own['distinct']} distinct")
    exact, partial = found["exact"], found["partial"]
    base = (
        f"14 answers of SmolLM2-135M-Instruct (temperature {temperature:g}) to 7 questions of a new "
        f"brand, {name}"
    )
    return [
        {"id": f"voice-distinct-{name.split()[1]}-t{temperature:g}", "value": partial["distinct"],
         "bound": ">= 13", "what": f"distinct scores, {base}; with credit: exact {exact['distinct']}"},
        {"id": f"voice-ties-{name.split()[1]}-t{temperature:g}", "value": partial["ties"],
         "bound": "== 0", "what": f"ties among 7 comparisons, {base}; with credit: exact {exact['ties']}"},
    ]  # fmt: skip


def measure() -> None:
    """Print the spread, and write its rows."""
    rows = []
    for temperature in TEMPERATURES:
        rows += spread_rows(load_voice(BAKERY / "voice.yaml"), "the whole file", temperature)
        rows += spread_rows(phrases_only(), "its phrases alone", temperature)
    exact, partial, ratio = sandbox_scores()
    print(f"sandbox: {len(set(exact))} distinct of {len(exact)}, partial {len(set(partial))}")
    rows += [
        {"id": "voice-order-kept", "value": concordance(exact, partial), "bound": ">= 0.95",
         "what": "share of pairs of 400 sandbox answers, ordered by exact credit, that partial credit orders alike"},
        {"id": "voice-cost", "value": ratio, "bound": "<= 4",
         "what": "CPU time of scoring 400 sandbox answers, partial to exact credit"},
    ]  # fmt: skip
    add_rows(RESULTS / "brand.json", [row | {"command": COMMAND} for row in rows])


if __name__ == "__main__":
    if len(sys.argv) > 1:
        for heat in TEMPERATURES:
            sample(sys.argv[1], heat)
    measure()

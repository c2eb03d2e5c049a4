"""Report cards of reward models whose truth is known, and of three sets of real pairs.

    RLHF_DATA=FOLDER nice -n 10 python -m benchmarks.reward.cards            # runs/reward-cards, all steps
    RLHF_DATA=FOLDER nice -n 10 python -m benchmarks.reward.cards --only voice
    nice -n 10 python -m benchmarks.reward.cards --only simulation rows

A step whose result is there is not done again. The sandbox is judged three times on the answers of
one SFT policy: by annotators without habits, by some who like length, by some who favour the left.
The real sets start from stories260K. `pages` copies the cards to benchmarks/results/reward-cards/,
`rows` writes benchmarks/results/reward.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.paths import RESULTS
from benchmarks.programs import make_sandbox, rlhf, run
from benchmarks.result_rows import add_rows, made_with, row_of
from benchmarks.votes.pandalm import read_rows
from reward.cards.bias import bias_tests
from reward.cards.page import write_card
from rlhf.data.store import Store
from rlhf.sandbox import CONFIGS, SHOP_VOICE
from rlhf.sandbox.annotators import Annotator, choose

RUNS = Path("runs/reward-cards")
PAGES = RESULTS / "reward-cards"
COMMAND = "python -m benchmarks.reward.cards"
# of the gold score (0 to 1) for one logit
NOISE = 0.2
CLEAN = Annotator("sim", ties=0.0, skips=0.0, strict=-1.0)
PLANTED = {
    "sandbox-clean": CLEAN,
    "sandbox-length": replace(CLEAN, length_bias=0.8),
    "sandbox-position": replace(CLEAN, side_bias=0.6),
}
REAL = ["--use_peft", "false", "--learning_rate", "1e-3", "--lr_scheduler_type", "linear"]
REAL += ["--per_device_train_batch_size", "8", "--center_rewards_coefficient", "0"]
REAL += ["--max_prompt_length", "192", "--max_response_length", "320"]
CARDS = [*PLANTED, "polite", "voice", "pandalm"]


def done(folder: Path, name: str = "result.json") -> bool:
    return (folder / name).is_file()


def sandbox() -> None:
    """Make the sandbox, and pairs of its SFT policy's answers: for training, and new ones."""
    make_sandbox(RUNS)
    for name, prompts, seed in (("pairs", 3000, 0), ("policy", 700, 1)):
        if not done(RUNS, f"{name}.db"):
            source = ["--model_name_or_path", f"{RUNS}/sft"]
            source += ["--data", f"{RUNS}/world/prompts.jsonl"]
            how = ["--config", str(CONFIGS / "sample.yaml"), "--prompts", str(prompts)]
            target = ["--store", str(RUNS / f"{name}.db"), "--seed", str(seed)]
            rlhf("collect", "sample", *source, *how, *target)


def plant(name: str) -> Path:
    """Return a copy of the sampled pairs in which this annotator has judged all."""
    from reward.compose import build_scorer
    from rlhf.sandbox.annotators import gold_scores

    path = RUNS / f"{name}.db"
    if path.is_file():
        return path
    partial = path.with_suffix(".partial.db")
    shutil.copyfile(RUNS / "pairs.db", partial)
    gold = build_scorer([{"voice": str(SHOP_VOICE)}])
    with Store.open(partial) as store, store.transaction():
        pairs = list(store.at().pairs().values())
        scores = gold_scores(pairs, gold)
        annotator = store.add_annotator("sim", kind="model")
        for pair in pairs:
            rng = random.Random(f"card {pair['id']}")
            left = rng.choice("ab")
            words = (len(pair["text_a"].split()), len(pair["text_b"].split()))
            answer = choose(PLANTED[name], scores[pair["id"]], words, left, NOISE, rng)
            store.vote(pair["id"], annotator, answer.choice, left=left)
    partial.rename(path)
    return path


def card_of_sandbox(name: str) -> None:
    sandbox()
    folder = RUNS / name
    if not done(folder):
        data = ["--data", str(plant(name)), "--validation_fraction", "0.3"]
        start = ["--model_name_or_path", str(RUNS / "sft"), "--output_dir", str(folder)]
        run("launch.reward", "--config", str(CONFIGS / "reward.yaml"), *start, *data)
    if name == "sandbox-clean" and not done(folder, "learning_curve.json"):
        rlhf("reward", "learning-curve", str(folder))
    gold = json.dumps([{"voice": str(SHOP_VOICE)}])
    policy = ["--on_policy", str(RUNS / "policy.db"), "--category", "intent"]
    rlhf("reward", "card", str(folder), "--gold", gold, *policy)


def real_data(name: str) -> str:
    """Return a copy of a file of RLHF_DATA below RUNS, so that cards name no folder of a machine."""
    RUNS.mkdir(parents=True, exist_ok=True)
    target = RUNS / name
    if not target.is_file():
        shutil.copyfile(Path(os.environ["RLHF_DATA"]) / name, target)
    return str(target)


def train_real(name: str, *options: str) -> Path:
    """Train a reward model from stories260K with all its weights."""
    folder = RUNS / name
    base = Path(os.environ["RLHF_DATA"]) / "models" / "stories260K"
    if not done(folder):
        start = ["--model_name_or_path", str(base), "--output_dir", str(folder)]
        run("launch.reward", *start, *REAL, *options)
    return folder


def card_of_polite() -> None:
    data = ["--data", real_data("pref_rasbt_polite.jsonl"), "--on_error", "skip"]
    held_out = ["--validation_fraction", "0.2", "--test_fraction", "0"]
    folder = train_real("polite", *data, *held_out, "--num_train_epochs", "5")
    rlhf("reward", "card", str(folder))


def card_of_voice() -> None:
    data = ["--data", real_data("pref_voice_professional_over_witty.jsonl")]
    # the data's own split: 18 answer pairs for testing, and all others for training
    data += ["--validation_fraction", "0"]
    folder = train_real("voice", *data, "--num_train_epochs", "5")
    rlhf("reward", "card", str(folder), "--split", "test")


def card_of_pandalm() -> None:
    store = RUNS / "pandalm.db"
    if not store.is_file():
        print("rows:", dict(import_votes(Path(real_data("pref_pandalm_human.jsonl")), store)))
    data = ["--data", str(store), "--validation_fraction", "0.3", "--test_fraction", "0"]
    folder = train_real("pandalm", *data, "--num_train_epochs", "2")
    rlhf("reward", "card", str(folder), "--category", "app")


def import_votes(source: Path, path: Path) -> Counter:
    """Put PandaLM's pairs and the votes of its three people into a store; the raw pair's first
    answer counts as shown left.
    """
    counts: Counter = Counter()
    partial = path.with_suffix(".partial.db")
    partial.unlink(missing_ok=True)
    with Store.open(partial, create=True) as store, store.transaction():
        people = [store.add_annotator(f"person {i}") for i in (1, 2, 3)]
        for row, first, second in read_rows(source):
            one, two = first.strip(), second.strip()
            if not one or not two or one == two:
                counts["without two different answers"] += 1
                continue
            prompt = store.add_prompt(
                [{"role": "user", "content": row["prompt"]}], metadata={"app": row["app"]}
            )
            # two models may have said the same, and a pair is voted on once
            a = store.add_response(prompt, one, model=f"row {row['id']} 1")
            b = store.add_response(prompt, two, model=f"row {row['id']} 2")
            pair = store.add_comparison(a, b)
            for person, choice in zip(people, row["votes"], strict=True):
                store.vote(pair, person, ("tie", "a", "b")[choice], left="a")
            counts["imported"] += 1
    partial.rename(path)
    return counts


def simulation(repeats: int = 2000) -> None:
    """How often a clean card shows a bias, and how often a planted one is found."""
    rng = np.random.default_rng(0)
    found = {}
    for groups in (30, 100, 300):
        for name, planted in (("clean", 0.0), ("planted", 0.8)):
            count = Counter()
            for _ in range(repeats if name == "clean" else repeats // 10):
                tests = bias_tests(*simulated(rng, groups, planted))
                count["any"] += any(test["found"] for test in tests)
                count.update(test["kind"] for test in tests if test["found"])
            total = repeats if name == "clean" else repeats // 10
            shares = {kind: number / total for kind, number in sorted(count.items())}
            found[f"{name}, {groups} groups"] = shares
            print(f"{name}, {groups} groups: {shares}")
    (RUNS / "simulation.json").write_text(json.dumps(found, indent=1) + "\n")


def simulated(rng: np.random.Generator, groups: int, planted: float) -> tuple:
    """Return what `bias_tests` reads of pairs whose longer answers are truly better (r = 0.45), and
    whose labels and scores prefer length and the first side by `planted`.
    """
    sizes = rng.integers(1, 4, groups)
    names = np.repeat(np.arange(groups), sizes).astype(str)
    gold = np.repeat(rng.normal(size=groups), sizes) + rng.normal(size=len(names))
    tokens = 10 * (0.5 * gold + rng.normal(size=len(names)))
    side = rng.choice([-1.0, 1.0], len(names))
    logit = gold + planted * (tokens / 10 + side)
    chosen = np.where(rng.random(len(names)) < 1 / (1 + np.exp(-logit)), 1.0, -1.0)
    score = 1.5 * gold + planted * tokens / 10 + rng.normal(size=len(names))
    return chosen * score, chosen * tokens, chosen * side, names, chosen * gold


def pages() -> None:
    """Write the cards, without texts of the data, and their figures beside the other results."""
    made = [name for name in CARDS if done(RUNS / name, "card.json")]
    lines = [head()]
    for name in made:
        card = json.loads((RUNS / name / "card.json").read_text(encoding="utf-8"))
        write_card(card | {"mistakes": []}, PAGES / name)
        lines.append(line_of(name, card))
    (PAGES / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_card(name: str) -> dict:
    return json.loads((PAGES / name / "card.json").read_text(encoding="utf-8"))


def head() -> str:
    options = " ".join(REAL)
    return f"""\
# Report cards of reward models

    RLHF_DATA=FOLDER python -m benchmarks.reward.cards

The sandbox's three reward models are of the same 3,000 answer pairs of one SFT policy (2,041 for training, 958 held
out, one vote a pair), judged by an annotator without habits, by one who likes length (0.8 log-odds for each ten words
more) and by one who favours the left (0.6 log-odds). Their cards have the true score as `--gold`, and 700 new pairs of
the policy as `--on_policy`. The real sets start from stories260K: polite 5 epochs with a fifth of the groups held out,
voice 5 epochs and the test split of its data, pandalm 2 epochs of single votes with three tenths of the groups held
out, all with

    {options}

{made_with("transformers", "trl")}

Texts of the data are left out of these pages.

| card | verdict | reasons | accuracy | best rule | on the policy | log-loss before and after the temperature |
|---|---|---|---|---|---|---|"""


def line_of(name: str, card: dict) -> str:
    accuracy = shown(card["accuracy"])
    rules = card["baselines"].values()
    best = max(rules, key=lambda part: part["accuracy"]["accuracy"] or 0.0)
    policy = card.get("on_policy")
    cells = [f"[{name}]({name}/card.md)", card["verdict"]]
    cells.append(", ".join(reason["kind"] for reason in card["reasons"]) or "none")
    cells += [accuracy, f"{best['rule']}: {best['accuracy']['accuracy']:.3f}"]
    cells.append(shown(policy["accuracy"]) if policy else "not measured")
    before, after = card["calibration"], card["calibration"]["after"]
    cells.append(f"{before['log_loss']:.3f}, {after['log_loss']:.3f}")
    return "| " + " | ".join(cells) + " |"


def shown(part: dict) -> str:
    if part["low"] is None:
        return f"{part['accuracy']:.3f}"
    return f"{part['accuracy']:.3f} ({part['low']:.3f} to {part['high']:.3f}, n = {part['n']})"


def found_biases(card: dict) -> set[str]:
    return {test["kind"] for test in card["bias"] if test["found"]}


def row(id: str, only: str, what: str, value: float | bool, bound: str) -> dict:
    return row_of(f"card-{id}", what, value, bound, f"{COMMAND} --only {only} pages rows")


def rows_of_simulation() -> list[dict]:
    """Return how often clean cards show a bias, and planted ones are found."""
    shares = json.loads((RUNS / "simulation.json").read_text())
    clean = [part.get("any", 0.0) for name, part in shares.items() if name.startswith("clean")]
    planted = shares["planted, 300 groups"]
    kinds = ("labels_length", "labels_position", "score_length")
    what = "simulated cards without a bias that show one (largest share of 30, 100, 300 groups)"
    power = "planted biases of 300 groups that are found (least share of three kinds)"
    return [
        row("false-alarms", "simulation", what, max(clean), "<= 0.03"),
        row("power", "simulation", power, min(planted.get(k, 0.0) for k in kinds), ">= 0.95"),
    ]


def rows_of_sandbox(cards: dict[str, dict]) -> list[dict]:
    """Return what was planted and found, and what only the sandbox can show."""
    clean = cards["sandbox-clean"]
    curve, policy = clean["learning_curve"], clean["on_policy"]
    gain = curve[-1]["accuracy"]["accuracy"] - curve[0]["accuracy"]["accuracy"]
    length = found_biases(cards["sandbox-length"]) == {"labels_length", "score_length"}
    position = found_biases(cards["sandbox-position"]) == {"labels_position"}
    bag = clean["baselines"]["bag_of_words"]["difference"]["mean"]
    return [
        row("clean", "sandbox-clean", "sandbox, clean labels: biases found",
            len(found_biases(clean)), "== 0"),
        row("planted-length", "sandbox-length",
            "sandbox, planted length bias: found in labels and score, and no other", length, "== True"),
        row("planted-position", "sandbox-position",
            "sandbox, planted position bias: found in the labels, and no other", position, "== True"),
        row("on-policy", "sandbox-clean",
            "sandbox, clean: accuracy on new pairs of the policy, lower end of its interval",
            policy["accuracy"]["low"], "> 0.5"),
        row("learning-curve", "sandbox-clean",
            "sandbox, clean: accuracy with all training pairs less that with an eighth", gain, "> 0"),
        row("sandbox-baseline", "sandbox-clean",
            "sandbox, clean: accuracy less that of the bag of words", bag, "> 0"),
    ]  # fmt: skip


def rows_of_real(cards: dict[str, dict]) -> list[dict]:
    """Return the real sets beside their yardsticks."""
    polite, voice, pandalm = (cards[name] for name in ("polite", "voice", "pandalm"))
    calibration, bag = polite["calibration"], voice["baselines"]["bag_of_words"]
    better = calibration["after"]["log_loss"] - calibration["log_loss"]
    honest = voice["verdict"] != "use it" or bag["difference"]["low"] > 0
    people = pandalm["ceiling"]
    return [
        row("polite", "polite", "polite: accuracy from stories260K (yardstick: about 0.92)",
            polite["accuracy"]["accuracy"], ">= 0.88"),
        row("temperature", "polite",
            "polite: log-loss with a cross-fitted temperature less that without", better, "< 0"),
        row("voice-groups", "voice", "voice: answer pairs that its intervals count, of 360 rows",
            voice["accuracy"]["n"], "== 18"),
        row("voice-bag-of-words", "voice", "voice: accuracy of the bag of words (yardstick: 0.83)",
            bag["accuracy"]["accuracy"], ">= 0.8"),
        row("voice-beaten", "voice", "voice: accuracy less that of the bag of words",
            bag["difference"]["mean"], "> 0"),
        row("voice-verdict", "voice",
            "voice: a model that does not surely beat the bag of words is not called 'use it'",
            honest, "== True"),
        row("pandalm-people", "pandalm", "pandalm: how often two people choose the same side",
            people["agreement"]["accuracy"], "> 0.5"),
        row("pandalm-verdict", "pandalm",
            "pandalm: a model that cannot be told from guessing is called 'do not use it'",
            pandalm["accuracy"]["low"] > 0.5 or pandalm["verdict"] == "do not use it", "== True"),
    ]  # fmt: skip


def rows() -> None:
    """Write the measured numbers with their bounds."""
    cards = {name: read_card(name) for name in CARDS}
    found = rows_of_simulation() + rows_of_sandbox(cards) + rows_of_real(cards)
    add_rows(RESULTS / "reward.json", found)


STEPS: dict[str, Callable[[], None]] = {
    "simulation": simulation,
    "sandbox-clean": lambda: card_of_sandbox("sandbox-clean"),
    "sandbox-length": lambda: card_of_sandbox("sandbox-length"),
    "sandbox-position": lambda: card_of_sandbox("sandbox-position"),
    "voice": card_of_voice,
    "polite": card_of_polite,
    "pandalm": card_of_pandalm,
    "pages": pages,
    "rows": rows,
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=STEPS, default=list(STEPS))
    RUNS.mkdir(parents=True, exist_ok=True)
    for step in parser.parse_args().only:
        STEPS[step]()

"""Two brands on one base: each adapter is to be best at its own voice, by held-out prompts.

    python -m benchmarks.brands.two_brands            # on the sandbox; resumes; writes rows and the page
    python -m benchmarks.brands.two_brands --real     # on SmolLM2-135M-Instruct, half an hour of a core,
                                                      # and by name from one server; needs the openai client

Both are trained by `rlhf brand run` with the same options of training. Each adapter's answers, and
the base's, to the test prompts of a brand are scored by its voice. On the sandbox the brands share
their prompts; on the real model each has its own.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.brands.served import served_answers
from benchmarks.paths import RESULTS, ROOT
from benchmarks.programs import fast_dtype, rlhf
from benchmarks.real.model import model_file
from benchmarks.result_rows import add_rows, made_with, row_of, write_page
from reward.compose import build_scorer
from rlhf.brand.answers import Scored, by_group, difference, scored_answers
from rlhf.brand.gates import Measured, bound_text, mean_of_groups, shown
from rlhf.data.store import Store
from rlhf.experiment.plan import flags
from rlhf.text import clip, markdown_table, with_interval

HERE = Path(__file__).parent
CONFIGS = ROOT / "rlhf" / "sandbox" / "configs"
OUTDOOR = ROOT / "rlhf" / "brand_data" / "outdoor"
TRAIN = {
    "loss_type": ["sigmoid"],
    "beta": 0.2,
    "num_train_epochs": 2,
    "per_device_train_batch_size": 32,
    "learning_rate": 1e-3,
    "warmup_steps": 5,
    "deepspeed": "zero0",
}
# of one server, on the real model
SERVED = RESULTS / "2026-11-29-two-brands-served.jsonl"
# answers of each brand that the page shows, and the characters of each
SAMPLES, SAMPLE_WIDTH = 5, 300
# voice -> policy ("base" and each adapter) -> its answers, scored by the voice
Scores = dict[str, dict[str, list[Scored]]]
# all else as `rlhf brand run` has it
TRAIN_REAL = {"train_eos": "never"}
SAMPLING = {
    "temperature": 0.7,
    "max_prompt_length": 96,
    # at 80 tokens 73 of 100 answers of the base are cut off, and none of those is rewritten
    "max_response_length": 160,
    "batch_size": 32,
}


@dataclass(frozen=True)
class Setting:
    """What the brands are tried on: the base, their voices, and what the results are called."""

    # before the ids of rows and the page: "" of the sandbox
    name: str
    base: str
    voices: dict[str, Path]
    command: str
    # how the page calls base and brands
    about: str

    @property
    def page(self) -> Path:
        return RESULTS / f"2026-11-29-two-brands{self.name}.md"


SANDBOX = Setting(
    "",
    "the sandbox's base",
    {"fernhill": CONFIGS / "voice.yaml", "street": CONFIGS / "street.yaml"},
    "python -m benchmarks.brands.two_brands",
    "`fernhill` is the shop's own voice, `street` asks for much of what that avoids",
)
REAL = Setting(
    "-real",
    "SmolLM2-135M-Instruct",
    {
        "outdoor": ROOT / "configs" / "voices" / "outdoor.yaml",
        "bakery": HERE / "bakery" / "voice.yaml",
    },
    "python -m benchmarks.brands.two_brands --real",
    "`outdoor` answers questions of its help desk and of templates, `bakery` those of its templates",
)


def templates_of(name: str) -> dict[str, Any]:
    """Return the templates of a brand's questions."""
    file = HERE / name / "templates.yaml"
    return yaml.safe_load(file.read_text(encoding="utf-8"))


def run_brands(
    setting: Setting,
    out: Path,
    base: str,
    train: dict[str, Any],
    prompts: dict[str, dict[str, Any]],
    options: dict[str, Any],
) -> None:
    """Run both brands with the same options but voice and prompts; what is done is not done again.

    prompts: brand -> the options that say what is asked. train: of `rlhf brand run`, options: its
    others.
    """
    train_file = out / "train.yaml"
    train_file.write_text(yaml.safe_dump(train))
    for name, voice in setting.voices.items():
        own = {
            "voice": str(voice),
            "model_name_or_path": base,
            "output_dir": str(out / name),
            **prompts[name],
            "train": {"config": str(train_file)},
            "votes": "simulated",
            "votes_per_pair": 3,
            **options,
        }
        file = out / f"{name}.yaml"
        file.write_text(yaml.safe_dump(own, sort_keys=False))
        rlhf("brand", "run", str(file))


def run_sandbox(out: Path) -> tuple[str, dict[str, list[Path]]]:
    """Build the world and run both brands on its prompts; return the base, and voice -> the stores
    with the answers that it scores.
    """
    world = out / "world"
    build = ["sandbox", "build", "--output_dir", str(world), "--n_prompts", "1000"]
    rlhf(*build, "--n_instructions", "50")
    base = str(world / "base")
    shared = {"prompts": [str(world / "prompts.jsonl")], "n_prompts": 800}
    options = {
        "texts": [str(world / "held_out.jsonl")],
        "task": [str(world / "short.jsonl")],
        "max_prompt_length": 64,
        "max_response_length": 48,
        "batch_size": 256,
    }
    run_brands(SANDBOX, out, base, TRAIN, dict.fromkeys(SANDBOX.voices, shared), options)
    # both were judged on the same prompts
    stores = [out / name / "ab.db" for name in SANDBOX.voices]
    return base, dict.fromkeys(SANDBOX.voices, stores)


def run_real(out: Path) -> tuple[str, dict[str, list[Path]]]:
    """Fetch the model, run both brands, and let all policies answer the test prompts of each;
    return the same.
    """
    base, sampling = model_file(), SAMPLING | {"dtype": fast_dtype()}
    # the help desk's test questions are of 15 groups, too few to show how seldom an adapter refuses
    more = out / "outdoor-templates.jsonl"
    filled = {"templates": templates_of("outdoor"), "output": str(more)}
    rlhf("brand", "prompts", *flags(filled))
    prompts = {
        "outdoor": {"prompts": [str(OUTDOOR / "questions.jsonl"), str(more)]},
        "bakery": {"templates": templates_of("bakery")},
    }
    options = {
        "n_prompts": 72,
        "texts": [str(OUTDOOR / "neutral.jsonl")],
        "task": [str(OUTDOOR / "neutral.jsonl")],
        **sampling,
        "launcher": "python",
    }
    run_brands(REAL, out, base, TRAIN_REAL, prompts, options)

    runs = [base, *(str(out / name / "dpo") for name in REAL.voices)]
    stores = {name: out / f"{name}-prompts.db" for name in REAL.voices}
    for name, store in stores.items():
        if not store.exists():
            data = prompts[name].get("prompts", [str(out / name / "prompts.jsonl")])
            sample = {"runs": runs, "data": data, "store": str(store), "split": "test"}
            sample |= {"prompts": 40, "test_fraction": 0.2, **sampling}
            rlhf("collect", "sample", *flags(sample))
    return base, {name: [store] for name, store in stores.items()}


def answers_of(setting: Setting, out: Path, base: str, stores: dict[str, list[Path]]) -> Scores:
    """Return the answers of all policies to the test prompts of each voice."""
    policies = {"base": base} | {name: str(out / name / "dpo") for name in setting.voices}
    found: Scores = {}
    for voice, file in setting.voices.items():
        scorer = build_scorer([{"voice": str(file)}])
        found[voice] = {}
        for path in stores[voice]:
            with Store.open(path, readonly=True) as store:
                scored = scored_answers(store.at().answers(), scorer)
            found[voice] |= {
                name: scored[policy] for name, policy in policies.items() if policy in scored
            }
    return found


def served_of(setting: Setting, answers: list[dict[str, Any]]) -> Scores:
    """Return the answers that were given by name, under the policy's: outdoor/dpo is outdoor."""
    found: Scores = {}
    for voice, file in setting.voices.items():
        own = [answer for answer in answers if answer["voice"] == voice]
        scored = scored_answers(own, build_scorer([{"voice": str(file)}]))
        names = {name: name.split("/")[0] for name in scored}
        found[voice] = {
            folder if folder in setting.voices else "base": scored[name]
            for name, folder in names.items()
        }
    return found


def advantages(scores: Scores) -> dict[str, Measured]:
    """Return voice -> its own adapter's score minus the other's, by the voice, on the same prompts."""
    found = {}
    for voice, own in scores.items():
        (other,) = set(own) - {"base", voice}
        found[voice] = difference(by_group(own[other], own[voice], lambda answer: answer.score))
    return found


def page(
    setting: Setting, scores: Scores, verdicts: dict[str, dict], served: Scores | None = None
) -> list[str]:
    """Return the lines of the results page. served: the answers that were given by name."""
    lines = [
        "# Two brands on one base",
        "",
        f"`{setting.command}`: two adapters of {setting.base}, trained by `rlhf brand run` with the same options. "
        f"{setting.about}. Means over test prompts with 95 % intervals. Votes are simulated. "
        + made_with("transformers", "trl"),
        "",
        *score_lines(setting, scores),
        "",
        "## Verdicts",
        "",
    ]
    for name, verdict in verdicts.items():
        lines.append(f"- {name}: {verdict['verdict']}")
    rows = []
    # gate by gate, each of all brands
    of_brands = [verdict["gates"] for verdict in verdicts.values()]
    for gates in zip(*of_brands, strict=True):
        cells = [f"{gate['status']}: {with_interval(gate, '{:.3g}'.format)}" for gate in gates]
        bound = bound_text(gates[0]["direction"], gates[0]["threshold"])
        rows.append([gates[0]["name"], bound, *cells])
    lines += ["", *markdown_table(["gate", "bound", *verdicts], rows)]
    if served:
        lines += ["", "## Switched by name", ""]
        lines += [
            "`rlhf serve RUN RUN`, asked by the openai client: the same test prompts, with the same seeds, of each "
            f"name ([answers]({SERVED.name})).",
            "",
            *score_lines(setting, served),
        ]
    return [*lines, "", *sample_lines(scores)]


def score_lines(setting: Setting, scores: Scores) -> list[str]:
    """Return the scores of all policies by each voice, and the own adapter's minus the other's."""
    rows = []
    for policy in ("base", *setting.voices):
        cells = []
        for own in scores.values():
            cells.append(shown(mean_of_groups([(a.group, a.score) for a in own[policy]])))
        rows.append([policy, *cells])
    header = ["answers of", *(f"score by {voice}" for voice in scores)]
    lines = markdown_table(header, rows, right=[1, 2])
    lines += ["", "On the same prompts, the own adapter's score minus the other's:", ""]
    for voice, found in advantages(scores).items():
        lines.append(f"- by {voice}: {shown(found)}, {found.groups} prompts")
    return lines


def sample_lines(scores: Scores) -> list[str]:
    """Return the first answers of base and own adapter to each brand's prompts, not chosen."""
    rows = []
    for voice, own in scores.items():
        adapted = {answer.prompt: answer for answer in own[voice]}
        both = [(answer, adapted[answer.prompt]) for answer in own["base"]]
        for before, after in both[:SAMPLES]:
            question = clip(before.messages[-1]["content"], SAMPLE_WIDTH)
            cells = [
                f"{answer.score:.2f}: {clip(answer.text, SAMPLE_WIDTH)}"
                for answer in (before, after)
            ]
            rows.append([voice, question, *cells])
    table = markdown_table(["voice", "prompt", "base", "own adapter"], rows)
    return ["## Samples", "", "The first answers, with their score; long ones are cut.", "", *table]


def rows_of(
    setting: Setting,
    advantage: dict[str, Measured],
    verdicts: dict[str, dict],
    served: dict[str, Measured] | None = None,
) -> list[dict]:
    """Return the rows of benchmarks/results/brand.json.

    advantage: of the answers to test prompts; served: the same of those that were given by name.
    """
    measured = [("", "", advantage)]
    if served:
        measured.append(("served-", ", switched by name when served", served))
    rows = []
    for part, how, differences in measured:
        for voice, found in differences.items():
            what = (
                f"two adapters on {setting.base}{how}: score by the voice {voice} of its own adapter "
                f"minus the other's, lower end of the 95 % interval over {found.groups} held-out prompts "
                f"(estimate {found.estimate:.3f})"
            )
            name = f"two-brands{setting.name}-{part}{voice}"
            rows.append(row_of(name, what, found.low, "> 0", setting.command))
    for voice, verdict in verdicts.items():
        what = f"the verdict of rlhf brand run for the voice {voice} on {setting.base}: {verdict['verdict']}"
        name = f"two-brands{setting.name}-ships-{voice}"
        rows.append(row_of(name, what, verdict["ship"], "== True", setting.command))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", help="default: runs/two-brands, runs/two-brands-real")
    parser.add_argument("--real", action="store_true", help="on SmolLM2-135M-Instruct")
    given = parser.parse_args()
    setting = REAL if given.real else SANDBOX
    out = Path(given.out or f"runs/two-brands{setting.name}").resolve()
    out.mkdir(parents=True, exist_ok=True)
    base, stores = run_real(out) if given.real else run_sandbox(out)
    scores = answers_of(setting, out, base, stores)
    verdicts = {
        name: json.loads((out / name / "verdict.json").read_text()) for name in setting.voices
    }
    served = None
    if given.real:
        runs = [str(out / name / "dpo") for name in setting.voices]
        prompts = {voice: own[0] for voice, own in stores.items()}
        answers = out / "served.jsonl"
        served = served_of(setting, served_answers(runs, prompts, answers, SAMPLING))
        SERVED.write_bytes(answers.read_bytes())
    lines = page(setting, scores, verdicts, served)
    write_page(setting.page, lines)
    by_name = advantages(served) if served else None
    add_rows(RESULTS / "brand.json", rows_of(setting, advantages(scores), verdicts, by_name))
    print("\n".join(lines))


if __name__ == "__main__":
    main()

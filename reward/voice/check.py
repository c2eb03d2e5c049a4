"""`rlhf voice check`: a brand voice in plain words, its contradictions, its own examples, and how a
model's answers spread under it.
"""

import statistics
from dataclasses import dataclass
from typing import Any

from reward.voice.answers import Answer, read_answers, same_prompt, sample_answers
from reward.voice.contradictions import contradictions
from reward.voice.score import Part, score_text, tone_judge, tones_of, weakest
from reward.voice.scorer import Voice, load_voice
from reward.voice.words import explain, remarks
from rlhf.config import SEED, option
from rlhf.errors import UserError
from rlhf.files import dumps
from rlhf.text import clip

# an example of the brand's own scores at least this
GOOD = 0.9

# scores that differ by less than this are equal
DIGITS = 6


@dataclass
class CheckConfig:
    """Explain a brand voice back in plain words, score its own examples, and say where it contradicts
    itself (exit code 2). With answers, or a model to sample them from: how their scores spread.
    """

    voice: str = option(help="the brand voice (YAML)")
    answers: str | None = option(None, "answers to score: a file, or a preference store")
    model_name_or_path: str | None = option(
        None, "a model or trained policy whose answers to `data` are sampled and scored instead"
    )
    data: list[str] = option([], "prompts to sample answers to: files or Hub names")
    prompts: int = option(16, "prompts, drawn by the seed", low=1)
    samples_per_prompt: int = option(2, "answers to each", low=1)
    temperature: float = option(1.0, "of sampling", above=0)
    max_prompt_length: int = option(512, "tokens; longer prompts are left out", low=1)
    max_response_length: int = option(128, "tokens with EOS", low=1)
    seed: int = option(0, "of the choice of prompts and of sampling", **SEED)
    judge: dict | None = option(
        None,
        "measures the tone, e.g. {openai: URL, model: NAME} or {http: URL}; without it tone is left out",
    )
    json: bool = option(False, "print JSON")

    def validate(self) -> None:
        if self.answers and self.model_name_or_path:
            raise UserError("'answers' and 'model_name_or_path' are both given; keep one")
        if bool(self.model_name_or_path) != bool(self.data):
            raise UserError("'model_name_or_path' and 'data' belong together; give both or none")


def check(config: CheckConfig) -> dict[str, Any]:
    """Print the report and return it. Raises UserError at its end where the file contradicts itself."""
    voice = load_voice(config.voice, keep_contradictions=True)
    judge = tone_judge(config.judge, voice, config.voice)
    rows, wrong = check_examples(voice, judge)
    report: dict[str, Any] = {
        "voice": voice.name,
        "language": voice.language,
        "credit": voice.credit,
        "parts": explain(voice),
        "channels": {name: explain(own) for name, own in voice.channels.items()},
        "remarks": remarks(voice),
        "examples": rows,
        "contradictions": all_contradictions(voice) + wrong,
    }
    answers = answers_of(config)
    if answers:
        report["spread"] = spread(voice, answers, judge)
    print(dumps(report, indent=1) if config.json else "\n".join(as_lines(config.voice, report)))
    count = len(report["contradictions"])
    if count:
        raise UserError(f"{config.voice}: {count} contradiction{'s' * (count > 1)}, listed above")
    return report


def answers_of(config: CheckConfig) -> list[Answer]:
    """Return the answers that the options name; none where they name none."""
    if config.answers:
        return read_answers(config.answers)
    if not config.model_name_or_path:
        return []
    return sample_answers(
        config.model_name_or_path,
        config.data,
        prompts=config.prompts,
        samples_per_prompt=config.samples_per_prompt,
        temperature=config.temperature,
        max_prompt_length=config.max_prompt_length,
        max_response_length=config.max_response_length,
        seed=config.seed,
    )


def all_contradictions(voice: Voice) -> list[str]:
    """Return the contradictions of the file, and those that only a channel has."""
    exact = voice.credit == "exact"
    found = contradictions(voice.sections, voice.facts, exact=exact)
    for name, own in voice.channels.items():
        for line in contradictions(own.sections, own.facts, exact=exact):
            if line not in found:
                found.append(f"channel '{name}': {line}")
    return found


def check_examples(voice: Voice, judge: Any = None) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the score of each example with its weakest parts, and what is wrong with them: a `do`
    below GOOD, a `dont` of at least GOOD, or one that scores no lower than its `do`.
    """
    rows, wrong = [], []
    for number, example in enumerate(voice.examples, 1):
        row: dict[str, Any] = {"example": number}
        for kind in ("do", "dont"):
            text = getattr(example, kind)
            if text is None:
                continue
            answer = Answer(text, metadata=example.facts)
            (tone,) = tones_of(voice, judge, [answer])
            total, parts, _ = score_text(voice, answer, tone)
            row[kind] = {"text": text, "score": total, "weak": _weak(parts)}
        do, dont = row.get("do"), row.get("dont")
        if do and do["score"] < GOOD:
            wrong.append(f"example {number}: its 'do' scores {do['score']:.2f}: {do['weak']}")
        if do and dont and dont["score"] >= do["score"]:
            wrong.append(
                f"example {number}: its 'dont' scores {dont['score']:.2f}, no less than its 'do'"
            )
        elif dont and dont["score"] >= GOOD:
            wrong.append(
                f"example {number}: its 'dont' scores {dont['score']:.2f}: no rule sees what is "
                "wrong with it"
            )
        rows.append(row)
    return rows, wrong


def _weak(parts: list[Part]) -> str:
    """Return the parts that cost most, with their scores and what was measured."""
    said = []
    for part in weakest(parts):
        note = f" ({part.mark.note})" if part.mark.note else ""
        said.append(f"{part.name} {part.score:.2f}{note}")
    return ", ".join(said)


def spread(voice: Voice, answers: list[Answer], judge: Any = None) -> dict[str, Any]:
    """Return how the scores of answers differ, by the file's credit and by `exact`.

    {"answers", "prompts", "pairs" (of answers to one prompt), "partial" and "exact": {"scores",
    "distinct", "ties" (pairs that score alike), "low", "mean", "high"}, "parts": {name: {"mean",
    "distinct"}}}
    """
    tones = tones_of(voice, judge, answers)
    pairs = same_prompt(answers)
    found: dict[str, Any] = {
        "answers": len(answers),
        "prompts": len({str(answer.prompt) for answer in answers}),
        "pairs": len(pairs),
    }
    by_part: dict[str, list[float]] = {}
    for credit in dict.fromkeys(("exact", voice.credit)):
        totals = []
        by_part = {}
        for place, answer in enumerate(answers):
            own = voice.on_channel(answer.metadata).model_copy(update={"credit": credit})
            scores = own.score(answer.text, answer.metadata, answer.ended, tones[place])
            totals.append(round(scores.pop("total"), DIGITS))
            for name, value in scores.items():
                by_part.setdefault(name, []).append(round(value, DIGITS))
        found[credit] = {
            "scores": totals,
            "distinct": len(set(totals)),
            "ties": sum(totals[a] == totals[b] for a, b in pairs),
            "low": min(totals),
            "mean": statistics.fmean(totals),
            "high": max(totals),
        }
    found["parts"] = {}
    for name, values in by_part.items():
        found["parts"][name] = {"mean": statistics.fmean(values), "distinct": len(set(values))}
    return found


def as_lines(path: str, report: dict[str, Any]) -> list[str]:
    """Return the report as lines of text."""
    lines = [
        f"{path}: the voice of {report['voice']} (language {report['language']}, credit "
        f"{report['credit']})",
        "",
        "What each part asks for, and what is left of the score where it fails:",
        *map(_part_line, report["parts"]),
    ]
    rules = {part["part"]: part["rule"] for part in report["parts"]}
    for name, parts in report["channels"].items():
        own = {part["part"]: part for part in parts}
        changed = [part for name, part in own.items() if part["rule"] != rules.get(name)]
        gone = [name for name in rules if name not in own]
        without = f", without {', '.join(gone)}" if gone else ""
        same = "" if changed or gone else ", the same"
        lines += ["", f"On the channel {name}{without}{same}" + ":" * bool(changed)]
        lines += map(_part_line, changed)
    if report["remarks"]:
        lines += ["", *(f"Note: {remark}." for remark in report["remarks"])]
    if report["examples"]:
        lines += ["", "Its examples:"]
    for row in report["examples"]:
        for kind in ("do", "dont"):
            if kind in row:
                own = row[kind]
                lines.append(
                    f"{row['example']:>2} {kind:<4} {own['score']:.2f}  {clip(own['text'], 60)}"
                )
                lines += [f"             {own['weak']}"] if own["weak"] else []
    if "spread" in report:
        lines += ["", *spread_lines(report["spread"], report["credit"])]
    found = report["contradictions"]
    lines += ["", "It contradicts itself:" if found else "It does not contradict itself."]
    return [*lines, *(f"- {line}" for line in found)]


def _part_line(part: dict[str, Any]) -> str:
    return f"{part['part']:<14} x{part['fails']:.2f}  {part['rule']}"


def spread_lines(found: dict[str, Any], credit: str) -> list[str]:
    """Return the spread of answers as lines of text."""
    own, exact = found[credit], found["exact"]
    pairs = found["pairs"]
    lines = [
        f"{found['answers']} answers to {found['prompts']} prompts score {own['low']:.3f} to "
        f"{own['high']:.3f}, mean {own['mean']:.3f}: {own['distinct']} distinct scores; "
        f"{own['ties']} of {pairs} pairs of answers to one prompt are ties."
    ]
    if credit != "exact":
        lines.append(
            f"With credit: exact: {exact['low']:.3f} to {exact['high']:.3f}, {exact['distinct']} "
            f"distinct scores, {exact['ties']} of {pairs} tie."
        )
    for name, part in found["parts"].items():
        lines.append(f"{name:<14} mean {part['mean']:.3f}, {part['distinct']} distinct")
    if own["distinct"] == 1 or (pairs and own["ties"] == pairs):
        lines.append(
            "WARNING: every comparison of these answers is a tie, so nothing can be learnt from them."
        )
    return lines

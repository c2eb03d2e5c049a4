"""`rlhf brand pairs`: pairs by a brand voice, from sampled answers and their rewriting by rule."""

import json
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.brand.answers import refusal_pattern, samples_of
from rlhf.config import option
from rlhf.data.records import Scorer
from rlhf.data.store import Store
from rlhf.errors import UserError, near_file
from rlhf.files import write_atomic

# (text, metadata) -> the text as rules would have it
Rewrite = Callable[[str, dict[str, Any]], str]


@dataclass(kw_only=True)
class PairsConfig:
    """Pairs by a brand voice: of each prompt's answers the best and the worst."""

    answers: str = option(
        help="a preference store with several answers to each prompt (rlhf collect sample)"
    )
    voice: str = option(help="the brand voice (YAML)")
    judge: dict = option({}, "what measures the tone of the voice, as for rlhf brand run")
    output: str = option(help="the file to write, .jsonl")
    margin: float = option(
        0.1, "the least difference in score of a pair; closer ones are left out", above=0, high=1
    )
    rewrite: bool = option(
        True, "answers are also rewritten by rule: greeting, closing, words to avoid, claims"
    )
    refusal_phrases: list[str] = option(
        [],
        "regular expressions of refusals, beside the English ones; an answer that refuses is never the better one",
    )


def pairs(config: PairsConfig, scorer: Scorer, rewrite: Rewrite) -> list[dict[str, Any]]:
    """Write and return the pairs as rows that `launch/dpo.py` reads. Raises UserError without one."""
    with Store.open(config.answers, readonly=True) as store:
        answers = store.at().answers()
    if not answers:
        raise UserError(f"{config.answers}: has no answers; sample some: rlhf collect sample")
    sampled = scorer(samples_of(answers)).total
    # rewritten ones last: of equal scores the model's own words win
    candidates, scores = list(answers), list(sampled)
    rewritten = rewritten_answers(answers, rewrite) if config.rewrite else []
    if rewritten:
        candidates += rewritten
        scores += scorer(samples_of(rewritten)).total
    declines = refusal_pattern(config.refusal_phrases)
    # a voice hears tone, not whether the question was answered; the verdict asks for both
    refused = [bool(declines.search(candidate["text"])) for candidate in candidates]
    rows, close = best_and_worst(candidates, scores, refused, config.margin)
    if not rows:
        raise UserError(
            f"{config.answers}: no prompt has two answers that differ by {config.margin} in score. Lower 'margin', "
            "or sample more answers to each prompt"
        )
    write_rows(config.output, rows)
    by_rule, better = 0, []
    for row in rows:
        by_rule += row["metadata"]["pair"]["by_rule"]
        better.append(row["metadata"]["pair"]["better"])
    print(
        f"{config.output}: {len(rows)} pairs, of {by_rule} the better answer is rewritten by rule; {close} prompts "
        f"left out, whose answers differ by less than {config.margin:g}. {sum(refused)} of {len(candidates)} answers "
        f"refuse and are never the better one. Mean score of the sampled answers {statistics.fmean(sampled):.3f}, of "
        f"the better ones {statistics.fmean(better):.3f}"
    )
    return rows


def rewritten_answers(answers: Sequence[dict[str, Any]], rewrite: Rewrite) -> list[dict[str, Any]]:
    """Return the answers that a rule changes, as it has them; those that were cut off have no end to
    put right.
    """
    changed = []
    for answer in answers:
        if answer["ended"] == 0:
            continue
        text = rewrite(answer["text"], answer["metadata"])
        # a rule that only moves blanks would make a pair of two equal answers
        if text.strip() != answer["text"].strip():
            changed.append({**answer, "text": text, "by_rule": True})
    return changed


def best_and_worst(
    candidates: Sequence[dict[str, Any]],
    scores: Sequence[float],
    refused: Sequence[bool],
    margin: float,
) -> tuple[list[dict[str, Any]], int]:
    """Return each prompt's pair as a row, and the number of prompts without one.

    Of equal scores the first counts, so that an answer as it was sampled goes before one by rule.
    refused: whether each candidate refuses; such an answer is never the better one.
    """
    places: dict[int, list[int]] = {}
    for place, candidate in enumerate(candidates):
        places.setdefault(candidate["prompt"], []).append(place)
    rows, close = [], 0
    for own in places.values():
        worst = min(own, key=scores.__getitem__)
        answering = [place for place in own if not refused[place]]
        best = max(answering, key=scores.__getitem__, default=worst)
        if scores[best] - scores[worst] < margin:
            close += 1
            continue
        better, worse = candidates[best], candidates[worst]
        # the group decides the split of the pair, as it did that of the prompt
        metadata = dict(better["metadata"])
        group = metadata.pop("group")
        how = {
            "better": scores[best],
            "worse": scores[worst],
            "by_rule": better.get("by_rule", False),
        }
        row = {"prompt": better["messages"], "group": group}
        row |= {"chosen": better["text"], "rejected": worse["text"]}
        # where the data says whether a prompt is trained on, no hash decides it
        if better["split"]:
            row["split"] = better["split"]
        # said only where it is so: a pair without it ended, and learns its EOS
        if better["ended"] == 0:
            row["chosen_ended"] = False
        if worse["ended"] == 0:
            row["rejected_ended"] = False
        rows.append(row | {"metadata": metadata | {"pair": how}})
    return rows, close


@dataclass(kw_only=True)
class CheckedConfig:
    """Pairs as votes leave them: turned where most prefer the other answer, left out where nobody
    prefers one, kept where nobody voted.
    """

    pairs: str = option(help="the pairs (rlhf brand pairs)")
    votes: str = option(help="the store with votes on some of them, STORE or STORE@EVENT")
    output: str = option(help="the file to write, .jsonl")


def checked(config: CheckedConfig) -> dict[str, Any]:
    """Write the pairs and OUTPUT.check.json with how far the votes agree; return the latter."""
    from rlhf.data.sources import split_event

    rows = read_rows(config.pairs)
    path, event = split_event(config.votes)
    with Store.open(path, readonly=True) as store:
        view = store.at(event)
        found, sources = preferred_texts(view)
        at = view.event
    kept, counts = [], Counter()
    for row in rows:
        key = pair_key(row["prompt"], row["chosen"], row["rejected"])
        # a check is a sample: pairs that nobody saw stay as the voice has them
        if key not in found:
            counts["not judged"] += 1
            kept.append(row)
        elif found[key] is None:
            counts["without a winner"] += 1
        elif found[key] == row["chosen"].strip():
            counts["agreed"] += 1
            kept.append(row)
        else:
            counts["turned"] += 1
            kept.append(turned(row))
    if not kept:
        raise UserError(f"{config.votes}: its votes leave none of the {len(rows)} pairs")
    write_rows(config.output, kept)
    # the verdict says whose votes it rests on, and so does the check
    source = "mixed"
    if len(sources) < 2:
        source = next(iter(sources), "none")
    report = {"source": source, "event": at, "pairs": len(rows), **counts}
    write_atomic(Path(f"{config.output}.check.json"), json.dumps(report, indent=1) + "\n")
    print(
        f"{config.output}: {len(kept)} pairs; votes ({source}) agree on {counts['agreed']}, turn {counts['turned']}, "
        f"leave out {counts['without a winner']}; {counts['not judged']} were not judged"
    )
    return report


def preferred_texts(view: Any) -> tuple[dict[tuple, str | None], set[str]]:
    """Return the text that most votes prefer of each judged pair (None: neither), and who voted."""
    pairs, sides, sources = view.pairs(), {}, set()
    for vote in view.votes():
        # control pairs test the annotator, not the pair
        if vote.choice != "skip" and pairs[vote.comparison]["kind"] == "normal":
            sides.setdefault(vote.comparison, Counter())[vote.choice] += 1
            sources.add(vote.source)
    found = {}
    for id, count in sides.items():
        pair = pairs[id]
        key = pair_key(pair["messages"], pair["text_a"], pair["text_b"])
        # as many for each side is no verdict
        found[key] = None
        if count["a"] != count["b"]:
            side = "a" if count["a"] > count["b"] else "b"
            found[key] = pair[f"text_{side}"].strip()
    return found, sources


def pair_key(prompt: list[dict[str, Any]], one: str, other: str) -> tuple:
    """Return what is the same of a pair in a file and in a store."""
    # a store shows the sides in either order, and strips texts
    return json.dumps(prompt, sort_keys=True), *sorted((one.strip(), other.strip()))


def turned(row: dict[str, Any]) -> dict[str, Any]:
    """Return the pair with the other answer as the better one."""
    changed = {**row, "chosen": row["rejected"], "rejected": row["chosen"]}
    for name, other in (("chosen_ended", "rejected_ended"), ("rejected_ended", "chosen_ended")):
        changed.pop(name, None)
        if other in row:
            changed[name] = row[other]
    return changed


def read_rows(file: str) -> list[dict[str, Any]]:
    """Return the rows that `pairs` has written. Raises UserError."""
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]
    except (OSError, ValueError):
        raise UserError(
            f"{file}: no pairs can be read; make them with: rlhf brand pairs{near_file(file)}"
        ) from None


def write_rows(output: str, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows as JSONL, whole or not at all."""
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomic(Path(output), text)

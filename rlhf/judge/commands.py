"""`rlhf judge pairs`, `rlhf judge export` and `rlhf judge import`."""

import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rlhf.config import option
from rlhf.data import sources
from rlhf.data.records import prompt_group
from rlhf.data.split import first_by_hash
from rlhf.errors import UserError, near_file
from rlhf.files import dumps, write_atomic
from rlhf.judge import alpaca_eval, arena_hard
from rlhf.judge.judges import load_judge
from rlhf.judge.pairs import (
    JudgedPair,
    add_votes,
    ask,
    read_pairs,
    store_pairs,
    write_pairs,
)
from rlhf.judge.policies import ANSWERS, CACHE, JUDGED
from rlhf.judge.report import judge_report, markdown

Form = Literal["alpaca_eval", "arena_hard"]
SAMPLES = "samples.jsonl"


@dataclass(kw_only=True)
class PairsConfig:
    """Ask a judge about pairs of answers in both orders, and say how far it can be believed: agreement
    with people, win rates corrected by their votes, what it favours, what it cost.
    """

    source: str = option(
        help="a preference store, samples.jsonl of `rlhf compare` (each policy against the first), or "
        "judged.jsonl, which is not asked about again without --judge"
    )
    judge: dict = option(
        {}, "{openai: URL, model: NAME, ...}, {http: URL} or {function: module:function}"
    )
    votes: str | None = option(None, "a preference store with votes on the same answers")
    own: list[str] = option(
        [], "policies of the judge's own kind; default: those whose name begins as its model's"
    )
    n_prompts: int | None = option(
        None, "groups of prompts to ask about, chosen by their hash; default: all", low=1
    )
    output_dir: str = option("runs/judge", "where judge.json, judge.md and judged.jsonl go")


def judge_pairs(config: PairsConfig) -> dict[str, Any]:
    """Ask, report and write; return judge.json's content."""
    folder = Path(config.output_dir)
    judge = load_judge(config.judge, folder / ANSWERS) if config.judge else None
    pairs = read_source(config.source)
    # whole groups, so that each counts fully
    order = dict.fromkeys(pair.group for pair in first_by_hash(pairs, None))
    kept = set(list(order)[: config.n_prompts])
    pairs = [pair for pair in pairs if pair.group in kept]

    if judge:
        ask(judge, pairs, folder / CACHE)
    elif not config.source.endswith(JUDGED):
        raise UserError(
            f"{config.source}: nobody has judged these pairs: give --judge "
            "'{openai: URL, model: NAME}', or a judged.jsonl"
        )
    # votes that came later need no question to be asked again
    if config.votes:
        add_votes(pairs, store_pairs(config.votes))
    policies = dict.fromkeys(itertools.chain.from_iterable((p.b, p.a) for p in pairs))
    report = judge_report(
        pairs,
        judge.name if judge else config.source,
        client=judge.client if judge else None,
        own=config.own,
        policies=list(policies),
    )
    write_pairs(folder / JUDGED, pairs)
    write_atomic(folder / "judge.json", dumps(report, indent=2) + "\n")
    text = "\n".join(markdown(report)) + "\n"
    write_atomic(folder / "judge.md", text)
    print(text)
    return report


def read_source(source: str) -> list[JudgedPair]:
    """Return the pairs of a store, of judged.jsonl, or of the policies in samples.jsonl."""
    if sources.is_store(source):
        return store_pairs(source)
    if source.endswith(JUDGED):
        return read_pairs(source)
    return pairs_of_samples(read_samples(source), source)


def read_samples(source: str | Path) -> Iterator[dict[str, Any]]:
    """Yield the rows {"policy", "prompt", "response", ...} of samples.jsonl. Raises UserError with
    the place of one that is none.
    """
    for place, row in sources.sound_rows(str(source)):
        if not {"policy", "prompt", "response"} <= row.keys():
            raise UserError(
                f'{place}: expected {{"policy", "prompt", "response"}}, as `rlhf compare` writes '
                "samples.jsonl"
            )
        yield row


def pairs_of_samples(rows: Iterable[dict[str, Any]], where: str) -> list[JudgedPair]:
    """Return pairs of each policy (a) and the first one (b) on the prompts that both answered.

    Sample k meets sample k + 1 of the first policy, cyclically: the k-th ones of `rlhf compare` share
    their sampling noise.
    """
    answers: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        prompt = dumps(row["prompt"])
        answers.setdefault(row["policy"], {}).setdefault(prompt, []).append(row["response"])
    if len(answers) < 2:
        raise UserError(
            f"{where}: has answers of {', '.join(answers) or 'nobody'}, expected two policies"
        )
    # as `rlhf compare` writes them: the SFT policy comes first
    reference, *others = answers
    pairs = []
    for policy, prompt in itertools.product(others, answers[reference]):
        of_b = answers[reference][prompt]
        for k, answer in enumerate(answers[policy].get(prompt, [])):
            asked = json.loads(prompt)
            messages = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
            pairs.append(
                JudgedPair(
                    prompt=asked,
                    group=prompt_group(messages),
                    a=policy,
                    b=reference,
                    answer_a=answer,
                    answer_b=of_b[(k + 1) % len(of_b)],
                )
            )
    if not pairs:
        raise UserError(f"{where}: {reference} and {', '.join(others)} have no prompt in common")
    return pairs


@dataclass(kw_only=True)
class ExportConfig:
    """Write answers and judged pairs as files of AlpacaEval or Arena-Hard.

    samples.jsonl of `rlhf compare` gives AlpacaEval's outputs (POLICY.json) or Arena-Hard's
    question.jsonl and model_answer/; judged.jsonl gives annotations.json of each two policies, or
    model_judgment/ besides.
    """

    source: str = option(help="samples.jsonl or judged.jsonl")
    to: Form = option(help="alpaca_eval or arena_hard")
    output_dir: str = option(help="where the files go")
    name: str = option("rlhf", "the judge's name in annotations and judgments")


def export(config: ExportConfig) -> None:
    """Write the files and print their places. Of several answers of a policy to a prompt the first
    is written.
    """
    folder = Path(config.output_dir)
    if config.source.endswith(JUDGED):
        pairs = read_pairs(config.source)
        # these files hold one answer to a prompt: the first one stays
        kept = list({(p.a, p.b, dumps(p.prompt)): p for p in reversed(pairs)}.values())[::-1]
        _say_left_out(len(pairs) - len(kept))
        if config.to == "arena_hard":
            arena_hard.write_judgments(folder, kept, config.name)
        else:
            for a, b in dict.fromkeys((pair.a, pair.b) for pair in kept):
                own = [pair for pair in kept if (pair.a, pair.b) == (a, b)]
                of_pair = folder / f"{arena_hard.file_name(a)}-over-{arena_hard.file_name(b)}"
                alpaca_eval.write_annotations(of_pair / "annotations.json", own, config.name)
    else:
        rows = list(read_samples(config.source))
        first = list({(r["policy"], dumps(r["prompt"])): r for r in reversed(rows)}.values())[::-1]
        _say_left_out(len(rows) - len(first))
        if config.to == "arena_hard":
            arena_hard.write_answers(folder, first)
        else:
            for policy in dict.fromkeys(row["policy"] for row in first):
                own = [row for row in first if row["policy"] == policy]
                alpaca_eval.write_outputs(folder / f"{arena_hard.file_name(policy)}.json", own)
    print(f"written: {folder}")


def _say_left_out(count: int) -> None:
    if count:
        print(f"left out: {count} further answers to the same prompts; these files hold one each")


@dataclass(kw_only=True)
class ImportConfig:
    """Read files of AlpacaEval or a folder of Arena-Hard as samples.jsonl or judged.jsonl.

    Outputs and model_answer/ become samples.jsonl, which `rlhf judge pairs` and `rlhf judge export`
    read; annotations and model_judgment/ become judged.jsonl.
    """

    source: list[str] = option(
        help="outputs or annotations of AlpacaEval (.json), the reference's first, or one folder of "
        "Arena-Hard"
    )
    output_dir: str = option(help="where samples.jsonl and judged.jsonl go")


def import_(config: ImportConfig) -> None:
    """Write what the files hold and print their places."""
    rows: list[dict[str, Any]] = []
    pairs: list[JudgedPair] = []
    for source in config.source:
        if Path(source).is_dir():
            rows += arena_hard.read_answers(source)
            pairs += arena_hard.read_judgments(source)
        elif not Path(source).is_file():
            raise UserError(f"{source}: no such file or folder{near_file(source)}")
        elif _has_preferences(source):
            pairs += alpaca_eval.read_annotations(source)
        else:
            rows += alpaca_eval.read_outputs(source)
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if rows:
        write_atomic(folder / SAMPLES, "".join(dumps(row) + "\n" for row in rows))
        policies = dict.fromkeys(row["policy"] for row in rows)
        print(f"{folder / SAMPLES}: {len(rows)} answers of {', '.join(policies)}")
    if pairs:
        write_pairs(folder / JUDGED, pairs)
        print(f"{folder / JUDGED}: {len(pairs)} judged pairs")


def _has_preferences(source: str) -> bool:
    """Return whether a file of AlpacaEval holds annotations."""
    rows = alpaca_eval.read_rows(source)
    return bool(rows) and "preference" in rows[0]

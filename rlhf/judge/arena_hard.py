"""Folders of Arena-Hard: question.jsonl, model_answer/MODEL.jsonl, model_judgment/JUDGE/MODEL.jsonl.

Version 2.0 is written: {"uid", "category", "prompt"}, {"uid", "ans_id", "model", "messages", "tstamp",
"metadata"}, {"uid", "category", "judge", "model", "baseline", "games": [{"score": "A>B", ...}, ...]}. In
the first game the baseline is A, in the second the model. Version 0.1 ("question_id", "turns",
"choices") is read too. A strong verdict (A>>B) is read as a verdict.
"""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rlhf.data.records import digest, prompt_group
from rlhf.data.sources import sound_rows
from rlhf.errors import UserError
from rlhf.files import dumps
from rlhf.judge.pairs import JudgedPair
from rlhf.judge.prompts import conversation_text

CATEGORY = "hard_prompt"
# of version 0.1, whose judgments do not name it
FIRST_BASELINE = "gpt-4-0314"
_CODE = re.compile(r"```[^`]*```")
_MARKDOWN = {
    "header_count": {f"h{n}": rf"^#{{{n}}}\s" for n in range(1, 7)},
    "list_count": {"ordered": r"^\s*\d+\.\s", "unordered": r"^\s*[-*+]\s"},
    "bold_count": {"**": r"\*\*[^*\n]+\*\*", "__": r"__[^_\n]+__"},
}


def write_answers(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows of samples.jsonl, the first answer of each policy to each prompt: question.jsonl and
    model_answer/.
    """
    questions: dict[str, dict] = {}
    answers: dict[str, dict[str, dict]] = {}
    for row in rows:
        prompt, policy = conversation_text(row["prompt"]), row["policy"]
        # a question of theirs keeps its name; another is named by its text
        uid = row.get("uid") or digest(prompt)
        question = {"uid": uid, "category": row.get("category") or CATEGORY, "prompt": prompt}
        questions.setdefault(uid, question)
        user = {"role": "user", "content": prompt}
        said = {"role": "assistant", "content": {"answer": row["response"]}}
        answer = {
            "uid": uid,
            "ans_id": row.get("ans_id") or digest(f"{policy}\n{prompt}\n{row['response']}"),
            "model": policy,
            "messages": [user, said],
            "tstamp": row.get("tstamp") or 0.0,
            "metadata": row.get("metadata") or style(row["response"]),
        }
        answers.setdefault(policy, {}).setdefault(uid, answer)
    _write(folder / "question.jsonl", questions.values())
    for policy, own in answers.items():
        _write(folder / "model_answer" / f"{file_name(policy)}.jsonl", own.values())


def style(text: str) -> dict[str, Any]:
    """Return what Arena-Hard's style control reads: length and counts of Markdown outside code.

    token_len counts words and punctuation marks, not the tokens of a model.
    """
    plain = _CODE.sub("", text)
    counts: dict[str, Any] = {"token_len": len(re.findall(r"\w+|[^\w\s]", text))}
    for name, patterns in _MARKDOWN.items():
        counts[name] = {key: len(re.findall(p, plain, re.M)) for key, p in patterns.items()}
    return counts


def read_answers(folder: str | Path) -> list[dict[str, Any]]:
    """Return all models' answers in a folder as rows of samples.jsonl, model by model."""
    folder = Path(folder)
    questions = {_uid(row): row for _, row in _read(folder / "question.jsonl")}
    rows = []
    for file in sorted((folder / "model_answer").glob("*.jsonl")):
        for place, row in _read(file):
            question = questions.get(_uid(row))
            if question is None:
                raise UserError(f"{place}: no question has uid {_uid(row)!r}")
            found = {
                "policy": row.get("model") or row.get("model_id") or file.stem,
                "prompt": _prompt(question),
                "response": _answer(row, place),
                "uid": _uid(row),
                "category": question.get("category"),
            }
            found |= {name: row[name] for name in ("ans_id", "tstamp", "metadata") if name in row}
            rows.append(found)
    if not rows:
        raise UserError(f"{folder}: found no answers in model_answer/")
    return rows


def write_judgments(folder: Path, pairs: Sequence[JudgedPair], judge: str) -> None:
    """Write judged pairs as games, and the questions and answers that they are of. Policy b is the
    baseline.
    """
    rows = []
    of_models: dict[str, dict[str, dict]] = {}
    for pair in pairs:
        prompt = conversation_text(pair.prompt)
        for policy, answer in ((pair.b, pair.answer_b), (pair.a, pair.answer_a)):
            rows.append({"policy": policy, "prompt": prompt, "response": answer})
        judgment = {
            "uid": digest(prompt),
            "category": CATEGORY,
            "judge": judge,
            "model": pair.a,
            "baseline": pair.b,
            "games": [_game(pair.p_ba), _game(pair.p_ab)],
            "group": pair.group,
        }
        of_models.setdefault(pair.a, {}).setdefault(judgment["uid"], judgment)
    write_answers(folder, rows)
    for model, own in of_models.items():
        file = folder / "model_judgment" / file_name(judge) / f"{file_name(model)}.jsonl"
        _write(file, own.values())


def read_judgments(folder: str | Path) -> Iterator[JudgedPair]:
    """Yield the pairs of all judgments in a folder, with their questions and answers."""
    folder = Path(folder)
    answers = {(row["policy"], row["uid"]): row for row in read_answers(folder)}
    for file in sorted((folder / "model_judgment").glob("**/*.jsonl")):
        for place, row in _read(file):
            model, baseline = row.get("model"), row.get("baseline") or FIRST_BASELINE
            of_model = answers.get((model, _uid(row)))
            of_baseline = answers.get((baseline, _uid(row)))
            if of_model is None or of_baseline is None:
                raise UserError(
                    f"{place}: model_answer/ has no answer of {model} and of "
                    f"{baseline} to {_uid(row)!r}"
                )
            # the baseline is shown first in the first game
            p_ba, p_ab = map(_first_better, row["games"])
            prompt = of_model["prompt"]
            default = prompt_group([{"role": "user", "content": prompt}])
            yield JudgedPair(
                prompt=prompt,
                group=row.get("group") or default,
                a=model,
                b=baseline,
                answer_a=of_model["response"],
                answer_b=of_baseline["response"],
                p_ab=p_ab,
                p_ba=p_ba,
            )


def file_name(name: str) -> str:
    """Return a model's name as the name of a file."""
    return name.replace("/", "__")


def _game(first_better: float) -> dict[str, Any]:
    """Return a game from P(first better), which is kept beside the label."""
    if math.isnan(first_better):
        return {"score": None, "judgment": {"answer": ""}, "prompt": []}
    label = "A=B" if first_better == 0.5 else "A>B" if first_better > 0.5 else "B>A"
    judgment = {"answer": f"[[{label}]]", "p": first_better}
    return {"score": label, "judgment": judgment, "prompt": []}


def _first_better(game: dict[str, Any] | None) -> float:
    """Return P(first better) of a game; nan where it has no score."""
    score = (game or {}).get("score")
    if score is None:
        return math.nan
    judgment = game.get("judgment")
    if isinstance(judgment, dict) and "p" in judgment:
        return float(judgment["p"])
    # how sure a verdict is does not count: A>>B is A>B
    left, sign, _ = re.fullmatch(r"([AB])([<>=]+)([AB])", score).groups()
    if "=" in sign:
        return 0.5
    return float((left == "A") == (">" in sign))


def _uid(row: dict[str, Any]) -> Any:
    return row.get("uid") or row.get("question_id")


def _prompt(question: dict[str, Any]) -> str:
    if "prompt" in question:
        return question["prompt"]
    # of several turns, which version 0.1 allows, one is used there too
    return question["turns"][0]["content"]


def _answer(row: dict[str, Any], where: str) -> str:
    try:
        if "messages" in row:
            content = row["messages"][-1]["content"]
            return content["answer"] if isinstance(content, dict) else content
        return row["choices"][0]["turns"][0]["content"]
    except (KeyError, IndexError, TypeError):
        raise UserError(f"{where}: holds no answer (messages, or choices[0].turns[0])") from None


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(dumps(row) + "\n" for row in rows), encoding="utf-8")


def _read(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Return (place, row) of a file of the folder. Raises UserError."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected a folder as Arena-Hard has it")
    return sound_rows(str(path))

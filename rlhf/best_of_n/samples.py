"""N answers of a policy to each prompt, and their scores: both kept in files, and made once."""

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.compare.runs import load_policies
from rlhf.data.records import Samples, Scorer, digest
from rlhf.engines.sampling import Sampling
from rlhf.errors import UserError
from rlhf.files import files_fingerprint, model_fingerprint, scorer_files
from rlhf.options.shared import NOISE_VERSION
from rlhf.row_file import add_rows, continue_scores, read_rows, start_rows

# answers that are made, or scored, between two writes are this many batches
BATCHES = 8


@dataclass(frozen=True)
class Drawing:
    """How answers are drawn: from which policy, how many to each prompt, and the limits of each."""

    policy: str
    sampling: Sampling
    samples: int
    seed: int
    max_prompt_length: int
    batch_size: int


def sample_answers(
    file: Path, drawing: Drawing, prompts: list[dict[str, Any]], tokenizer: Any
) -> list[dict]:
    """Return a row for each prompt with its answers; those in the file are not made again.

    prompts: encoded, see `encode_prompts`. Raises UserError where the file holds answers of another
    policy, to other prompts or drawn otherwise.
    """
    made_from = {
        "policy": model_fingerprint(drawing.policy),
        "prompts": digest(json.dumps([row["prompt_ids"] for row in prompts])),
        "samples": drawing.samples,
        "temperature": drawing.sampling.temperature,
        "max_response_length": drawing.sampling.max_new_tokens,
        "seed": drawing.seed,
        "noise": NOISE_VERSION,
    }
    done = read_rows(file, made_from)
    if done is None and file.is_file():
        raise UserError(
            f"{file}: holds answers of another policy, to other prompts, or drawn with other options. "
            "Choose another --output_dir, or remove the file"
        )
    if done is None:
        start_rows(file, made_from)
        done = []
    # rows are in the order of the prompts
    missing = prompts[len(done) :]
    if missing:
        answer = answering(drawing, tokenizer)
        done += in_parts(file, missing, drawing.samples, drawing.batch_size, "sampling", answer)
    return done


def answering(drawing: Drawing, tokenizer: Any) -> Callable[[list[dict], Callable], list[dict]]:
    """Return a function that draws the answers to some prompts; it holds the policy."""
    from rlhf.evaluate import Evaluation
    from rlhf.model.packing import head_is_plain
    from rlhf.model.tokenizer import stop_ids
    from rlhf.ranks.distributed import DistributedContext, own_device

    world = DistributedContext(device=own_device())
    limits = (drawing.max_prompt_length, drawing.sampling.max_new_tokens)
    ((model, context),) = load_policies([drawing.policy], world.device, *limits)

    def answer(part: list[dict], progress: Callable[[int], Any]) -> list[dict]:
        evaluation = Evaluation(
            prompts=part,
            tokenizer=tokenizer,
            stop_ids=stop_ids(tokenizer, model),
            sampling=drawing.sampling,
            samples_per_prompt=drawing.samples,
            seed=drawing.seed,
            batch_size=drawing.batch_size,
            plain_head=head_is_plain(model),
        )
        answers = evaluation.run(model, context, None, world, progress)
        rows = []
        for number, row in enumerate(part):
            # the answers to one prompt stand together
            own = answers[number * drawing.samples : (number + 1) * drawing.samples]
            rows.append(row_of(row, own))
        return rows

    return answer


def row_of(prompt: dict[str, Any], answers: list[Any]) -> dict[str, Any]:
    """Return a line of the file: an encoded prompt with its answers (evaluation rows)."""
    row = {
        "prompt": prompt["record"].prompt,
        "prompt_ids": prompt["prompt_ids"],
        "metadata": answers[0].metadata,
        "group": prompt["record"].group,
    }
    row |= {"responses": [], "ids": [], "ended": []}
    for answer in answers:
        row["responses"].append(answer.response)
        row["ids"].append(answer.ids)
        row["ended"].append(answer.ended)
    return row


def score_answers(
    file: Path,
    answers: list[dict],
    specs: list[dict[str, Any]],
    build: Callable[[], Scorer],
    batch_size: int,
) -> dict[str, np.ndarray]:
    """Return score -> (prompts, samples) of each of `specs`; what is in the file is not scored
    again.

    build: makes the scorer of `specs`; not called where nothing is left to score.
    """
    samples = len(answers[0]["responses"])
    made_from = {
        "answers": digest(json.dumps([row["ids"] for row in answers])),
        "scorers": specs,
        "files": files_fingerprint(itertools.chain.from_iterable(map(scorer_files, specs))),
    }
    done = continue_scores(file, made_from, "answers or scorers")
    missing = answers[len(done) :]
    names = [spec["name"] for spec in specs]
    if missing:
        scorer = build()

        def score(part: list[dict], progress: Callable[[int], Any]) -> list[dict]:
            scores = scorer(samples_of(part))
            progress(len(part) * samples)
            rows = []
            for number in range(len(part)):
                own = slice(number * samples, (number + 1) * samples)
                rows.append({name: list(map(float, scores.breakdown[name][own])) for name in names})
            return rows

        done += in_parts(file, missing, samples, batch_size, "scoring", score)
    scores = {}
    for name in names:
        scores[name] = np.array([row[name] for row in done], dtype=float)
    return scores


def samples_of(answers: list[dict]) -> Samples:
    """Return all answers to these prompts as scorers read them, prompt by prompt."""
    flat = Samples()
    for row in answers:
        answered = zip(row["responses"], row["ids"], row["ended"], strict=True)
        for response, ids, ended in answered:
            about = {"ended": ended, "prompt_ids": row["prompt_ids"], "response_ids": ids}
            flat.add(row["prompt"], response, row["metadata"], **about)
    return flat


def in_parts(
    file: Path,
    rows: list[dict],
    samples: int,
    batch_size: int,
    title: str,
    make: Callable[[list[dict], Callable[[int], Any]], list[dict]],
) -> list[dict]:
    """Return what `make` makes of the rows, some prompts at a time, each part added to the file as
    soon as it is made.
    """
    from tqdm import tqdm

    # so that a kill loses minutes, not hours
    size = max(1, BATCHES * batch_size // samples)
    made = []
    with tqdm(total=len(rows) * samples, desc=title, unit="answer", mininterval=5) as bar:
        for start in range(0, len(rows), size):
            part = make(rows[start : start + size], bar.update)
            add_rows(file, part)
            made += part
    return made

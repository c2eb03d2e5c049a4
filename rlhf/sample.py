"""`rlhf collect sample`: two or more responses a prompt from a policy, put into the preference store to be judged."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

from rlhf.config import UserError, option
from rlhf.data.records import Prompt


@dataclass(kw_only=True)
class SampleConfig:
    """Sample responses to prompts of the training and validation splits and store every pair of them for judging."""

    model_name_or_path: str = option(help="the policy: a Hub name, a folder of weights, or an adapter (runs/sft)")
    data: list[str] = option(help="prompts: files or Hub names; the test split is left out")
    store: str = option(help="the preference store (SQLite) to write to; made when missing")
    prompts: int | None = option(None, "so many prompts, drawn by the seed; default: all")
    samples_per_prompt: int = option(2, "responses to each; every two that differ become a comparison")
    temperature: float = option(1.0, "of sampling")
    top_p: float = option(1.0, "sample from the smallest set of tokens that reaches this probability")
    max_prompt_length: int = option(512, "tokens; longer prompts are dropped and counted")
    max_response_length: int = option(512, "tokens with EOS")
    batch_size: int = option(64, "responses generated together")
    seed: int = option(0, "of the choice of prompts and of sampling")
    validation_fraction: float = option(0.05, "as in the stages")
    test_fraction: float = option(0.1, "as in the stages")

    def validate(self) -> None:
        if self.temperature <= 0:
            raise UserError(f"'temperature' is {self.temperature}, expected more than 0")
        if self.batch_size < 1 or (self.prompts is not None and self.prompts < 1):
            raise UserError("'batch_size' and 'prompts' must be at least 1")
        if self.samples_per_prompt < 2:
            raise UserError(f"'samples_per_prompt' is {self.samples_per_prompt}, a comparison needs at least 2")


def sample(config: SampleConfig) -> dict[str, int]:
    """Write prompts, responses and comparisons; returns their counts. Repeating the call adds nothing new."""
    import random

    import torch
    from tqdm import tqdm

    from rlhf.data.encode import decode_response, encode_prompts
    from rlhf.data.load import load
    from rlhf.data.store import Store
    from rlhf.engines.hf import Sampling, generate, sample_key
    from rlhf.models import folder_fingerprint, load_foundation, stop_ids, trainable_policy

    fractions = {"validation_fraction": config.validation_fraction, "test_fraction": config.test_fraction}
    records = [r for split in ("train", "validation") for r in load(config.data, Prompt, split=split, **fractions)]
    random.Random(config.seed).shuffle(records)
    cuda = torch.cuda.is_available()
    foundation = load_foundation(config.model_name_or_path, "bfloat16" if cuda else "float32")
    tokenizer = foundation.tokenizer
    rows = encode_prompts(records[: config.prompts], tokenizer, config.max_prompt_length)
    model = trainable_policy(foundation, None).to("cuda" if cuda else "cpu")
    wanted = [(row, s) for row in rows for s in range(config.samples_per_prompt)]
    with tqdm(total=len(wanted), desc="sampling", unit="response", mininterval=5) as bar:
        done = generate(
            model,
            [row["prompt_ids"] for row, _ in wanted],
            [sample_key(config.seed, "collect", row["prompt_ids"], s) for row, s in wanted],
            Sampling(config.max_response_length, config.temperature, top_p=config.top_p),
            stop_ids(tokenizer, foundation.model),
            tokenizer.pad_token_id,
            config.batch_size,
            bar.update,
        )
    texts = [decode_response(tokenizer, ids) for ids in done.response_ids]
    sampling = {"temperature": config.temperature, "top_p": config.top_p, "max_new_tokens": config.max_response_length}
    origin = {
        "model": config.model_name_or_path,
        "model_fingerprint": foundation.fingerprint,
        "adapter_fingerprint": folder_fingerprint(foundation.adapter_path) if foundation.adapter_path else None,
        "sampling": {**sampling, "seed": config.seed},
    }
    counts = {"prompts": len(rows), "responses": 0, "comparisons": 0, "equal": 0, "empty": 0}
    Path(config.store).parent.mkdir(parents=True, exist_ok=True)
    with Store.open(config.store, create=True) as store, store.transaction():
        for index, row in enumerate(rows):
            record = row["record"]
            prompt = store.add_prompt(
                record.prompt, group=record.group, voice=record.voice, split=record.split, metadata=record.metadata
            )
            answers: dict[str, int] = {}
            for place in range(index * config.samples_per_prompt, (index + 1) * config.samples_per_prompt):
                if not texts[place]:
                    counts["empty"] += 1
                elif texts[place] in answers:
                    counts["equal"] += 1
                else:
                    answers[texts[place]] = store.add_response(prompt, texts[place], ended=done.ended[place], **origin)
            counts["responses"] += len(answers)
            for one, other in itertools.combinations(answers.values(), 2):
                store.add_comparison(one, other)
                counts["comparisons"] += 1
    ended = sum(done.ended) / max(1, len(done.ended))
    print(
        f"{config.store}: {counts['prompts']} prompts, {counts['responses']} responses ({ended:.0%} ended), "
        f"{counts['comparisons']} comparisons; {counts['equal']} equal and {counts['empty']} empty responses left out"
    )
    return counts

"""What is asked of a vLLM server, and what an answer has to hold.

The fields are those of vLLM 0.10.2 (the first with `return_token_ids`) to 0.33.
"""

import math
import os
from typing import Any

from rlhf.engines.sampling import Sampling
from rlhf.errors import UserError
from rlhf.http_client import Answer, Service

# settings of an adapter that vLLM refuses, or does not read
NOT_LOADED = (
    *("use_dora", "modules_to_save", "trainable_token_indices", "lora_bias"),
    *("rank_pattern", "alpha_pattern"),
)
# what --max-lora-rank can be
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
# sent, since a model's generation_config.json may set them on the server
NEUTRAL = dict(repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0, min_p=0.0)
EXPECTED = "choices[0] with token_ids, prompt_token_ids and logprobs.token_logprobs (vLLM 0.10.2)"


def check_settings(config: Any) -> None:
    """Raise UserError for an adapter that vLLM would refuse, or take for another one."""
    for name in NOT_LOADED:
        value = getattr(config, name, None)
        if not value:
            continue
        remedy = "Sample in this process, or start from a merged model"
        if name == "trainable_token_indices":
            remedy += " (launch/sft.py --merge true) with --train_eos never"
        raise UserError(
            f"'vllm_url': the adapter has '{name}: {value}', which vLLM cannot load. {remedy}"
        )


def rank_option(rank: int) -> int:
    """Return the --max-lora-rank that an adapter of this rank needs; the rank itself where none is enough."""
    return next((allowed for allowed in RANKS if allowed >= rank), rank)


def request_body(
    model: str, prompt: list[int], key: int, sampling: Sampling, stop_ids: list[int]
) -> dict[str, Any]:
    """Return what asks for one response: a request has one seed."""
    return {
        "model": model,
        "prompt": prompt,
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "seed": key,
        # these alone end a response, whatever the model's own files say
        "stop_token_ids": sorted(stop_ids),
        "ignore_eos": True,
        "include_stop_str_in_output": True,
        "add_special_tokens": False,
        # of the sampled token alone
        "logprobs": 0,
        "return_token_ids": True,
        **NEUTRAL,
    }


def fault_of(choices: Any, asked: dict[str, Any]) -> str:
    """Return what is wrong with the answer to a request, or ""."""
    try:
        (choice,) = choices
        ids, read = choice["token_ids"], choice["prompt_token_ids"]
        logprobs = choice["logprobs"]["token_logprobs"]
        is_whole = len(ids) == len(logprobs) > 0 and all(map(math.isfinite, logprobs))
    except (ValueError, KeyError, TypeError):
        return f"expected {EXPECTED}"
    stops, limit = set(asked["stop_token_ids"]), asked["max_tokens"]
    if not is_whole:
        return f"{len(ids)} tokens and {len(logprobs)} log-probabilities, expected as many, finite"
    if read != asked["prompt"]:
        return f"it read another prompt than was given: {len(read)} tokens"
    if len(ids) > limit or stops & set(ids[:-1]):
        return f"{len(ids)} tokens, expected at most {limit}, and none after a stop token"
    if len(ids) < limit and ids[-1] not in stops:
        return f"a response was cut off after {len(ids)} of {limit} tokens: raise --max-model-len"
    return ""


def read_list(service: Service, answer: Answer, key: str) -> list[Any]:
    """Return the list `key` of an answer in JSON. Raises UserError where there is none."""
    try:
        return list(answer.json()[key])
    except (ValueError, KeyError, TypeError):
        found = answer.excerpt(service)
        raise UserError(f"{service}: expected JSON with a list '{key}', found {found}") from None


def is_same_model(served: str | None, base: str) -> bool:
    """Return whether a server's name or path of its model is that of the base."""
    are_paths = bool(served) and os.path.exists(served) and os.path.exists(base)
    return served == base or (are_paths and os.path.samefile(served, base))

"""Sampling from a vLLM server that runs beside the training: experimental.

A drop-in for `rlhf.engines.batched.generate`. The server holds the base; the active adapter is
handed over as files that both sides see under one path, whenever it has changed:

    GET  /v1/models               which base it serves
    POST /v1/load_lora_adapter    the adapter's folder, under a name that is used once
    POST /v1/completions          token ids in, token ids and their log-probabilities out
    POST /v1/unload_lora_adapter  the adapter before, whose files are removed

Seeds come from the samples' keys, but the server's noise is its own: responses are not those of the
built-in engine. What is sent and checked: `rlhf/engines/vllm_protocol.py`.
"""

import atexit
import concurrent.futures
import contextlib
import copy
import hashlib
import secrets
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import save
from torch import nn

from rlhf.engines.sampling import Completions, Sampling
from rlhf.engines.vllm_protocol import (
    check_settings,
    fault_of,
    is_same_model,
    rank_option,
    read_list,
    request_body,
)
from rlhf.errors import UserError
from rlhf.http_client import Answer, Service, ask, vllm_service
from rlhf.ranks.distributed import DistributedContext
from rlhf.text import say_once

# seconds for one answer, of which a busy server needs many, and attempts after the first
TIMEOUT, RETRIES = 600.0, 3
# so many responses of each call are compared with the learner's own log-probabilities
CHECKED_ROWS = 4
# mean |server's - learner's| log-probability of a token, nats: above the first, which rounding to
# bfloat16 rarely reaches, it is said; above the second the server has another model
ROUNDING, LARGEST_GAP = 0.1, 1.0


class VllmEngine:
    """Samples responses from a server; called with the arguments of `rlhf.engines.hf.generate`.

    All ranks call it together: the main rank hands over the adapter, then each asks for its rows.
    """

    def __init__(self, url: str, folder: Path, base: str, world: DistributedContext | None = None):
        """`folder` is where the server finds adapters, and nothing else is kept there; `base` is
        the name or folder of the base model.
        """
        self.folder, self.base, self.world = folder, base, world or DistributedContext()
        self.service = vllm_service(url, TIMEOUT, RETRIES)
        # the server's name of the base
        self.served = ""
        # the adapter that the server has: a name that tells runs apart, a hash of the weights
        self.run_name, self.count = f"rlhf-{secrets.token_hex(4)}", 0
        self.adapter, self.digest = "", ""

    def check_base(self) -> None:
        """Raise UserError on all ranks unless the server can be reached and serves this base."""
        self.served = self._from_main_rank(self._find_base)

    def __call__(
        self,
        model: nn.Module,
        prompt_ids: list[list[int]],
        keys: list[int],
        sampling: Sampling,
        stop_ids: list[int],
        pad_id: int,
        batch_size: int = 64,
        progress: Callable[[int], None] | None = None,
    ) -> Completions:
        """Sample one response per prompt with the active adapter, `batch_size` at a time.

        Raises UserError, on all ranks, where the server does not take the adapter, does not answer,
        or answers with something else than was asked for.
        """
        if not self.served:
            self.check_base()
        name = self._from_main_rank(lambda: self._hand_over(model))
        requests = []
        for prompt, key in zip(prompt_ids, keys, strict=True):
            requests.append(request_body(name, prompt, key, sampling, stop_ids))

        def sample() -> Completions:
            if not requests or sampling.max_new_tokens < 1:
                empty = [[] for _ in requests]
                return Completions(empty, [False] * len(empty), empty)
            done = self._sample(requests, batch_size, progress)
            # those of top_k and top_p are of a restricted distribution
            if sampling.top_k == 0 and sampling.top_p == 1.0:
                self._check_logprobs(model, prompt_ids, done, sampling.temperature or 1.0)
            return done

        return self.world.raise_on_all_ranks(sample)

    def _from_main_rank(self, call: Callable[[], str]) -> str:
        """Return on all ranks what `call` returns on the main one, or raise its UserError."""
        result = self.world.raise_on_all_ranks(lambda: call() if self.world.is_main else "")
        return self.world.gather([result])[0]

    def _ask(
        self, path: str, content: Any, work: str, stop: threading.Event | None = None, **limits: Any
    ) -> tuple[Service, Answer]:
        service = replace(self.service, url=f"{self.service.url}/{path}", **limits)
        return service, ask(service, content, work, stop)

    def _find_base(self) -> str:
        service, answer = self._ask("models", None, "list its models")
        # adapters have a parent
        cards = [c for c in read_list(service, answer, "data") if not c.get("parent")]
        for card in cards:
            if any(is_same_model(card.get(key), self.base) for key in ("id", "root")):
                return card["id"]
        found = ", ".join(str(card.get("root") or card.get("id")) for card in cards)
        raise UserError(
            f"{service}: it serves {found or 'nothing'}, and this run's base is {self.base}. Serve that one, and where "
            f"it has another path there, add --served-model-name {self.base}"
        )

    def _hand_over(self, model: nn.Module) -> str:
        """Give the server the active adapter unless it has it; return its name there."""
        active = active_adapter(model)
        if active is None:
            return self.served
        config = copy.copy(model.peft_config[active])
        config.inference_mode = True
        check_settings(config)
        weights = get_peft_model_state_dict(model, adapter_name=active, save_embedding_layers=False)
        content = save({name: w.detach().cpu().contiguous() for name, w in weights.items()})
        digest = hashlib.sha256(content).hexdigest()
        if digest == self.digest:
            return self.adapter

        before, name = self.adapter, f"{self.run_name}-{self.count + 1}"
        if not before:
            # what a run that was killed has left
            shutil.rmtree(self.folder, ignore_errors=True)
            atexit.register(self.close)
        folder = self.folder.resolve() / name
        folder.mkdir(parents=True)
        config.save_pretrained(folder)
        (folder / "adapter_model.safetensors").write_bytes(content)
        self._load(name, folder, config.r)
        self.adapter, self.digest, self.count = name, digest, self.count + 1
        if before:
            self._forget(before)
        return name

    def _load(self, name: str, folder: Path, rank: int) -> None:
        # in place: an answer may be lost, and the request made again
        asked = {"lora_name": name, "lora_path": str(folder), "load_inplace": True}
        try:
            self._ask("load_lora_adapter", asked, "load an adapter")
        except UserError as error:
            raise UserError(
                f"{error}\n  The server has to see {folder} under this path and to be started with\n"
                f"    VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve {self.base} --enable-lora "
                f"--max-lora-rank {rank_option(rank)} --logprobs-mode processed_logprobs"
            ) from None

    def _forget(self, name: str) -> None:
        try:
            self._unload(name)
        except UserError as error:
            # it takes memory there, and nothing asks for it again
            say_once(str(error))
        shutil.rmtree(self.folder / name, ignore_errors=True)

    def _unload(self, name: str) -> None:
        asked = {"lora_name": name}
        self._ask("unload_lora_adapter", asked, "unload an adapter", timeout=30.0, retries=0)

    def close(self) -> None:
        """Take the last adapter off the server if that is there, and remove its files."""
        if self.adapter:
            # the run may end because the server has
            with contextlib.suppress(UserError):
                self._unload(self.adapter)
        self.adapter = self.digest = ""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _sample(self, requests: list[dict], batch_size: int, progress) -> Completions:
        """Return the response to each request, in order."""
        count = len(requests)
        done = Completions([[]] * count, [False] * count, [[]] * count)
        # requests that wait for a retry end at once when another has failed
        stop = threading.Event()
        pool = concurrent.futures.ThreadPoolExecutor(min(batch_size, count))
        try:
            rows = {pool.submit(self._response, r, stop): row for row, r in enumerate(requests)}
            for response in concurrent.futures.as_completed(rows):
                row = rows[response]
                done.response_ids[row], done.logprobs[row] = response.result()
                done.ended[row] = done.response_ids[row][-1] in requests[row]["stop_token_ids"]
                if progress is not None:
                    progress(1)
        finally:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
        return done

    def _response(self, asked: dict, stop: threading.Event) -> tuple[list[int], list[float]]:
        work = f"sample {asked['max_tokens']} tokens"
        service, answer = self._ask("completions", asked, work, stop=stop)
        choices = read_list(service, answer, "choices")
        fault = fault_of(choices, asked)
        if fault:
            raise UserError(f"{service}: {fault}. It answered {answer.excerpt(service)}")
        return choices[0]["token_ids"], choices[0]["logprobs"]["token_logprobs"]

    def _check_logprobs(self, model, prompt_ids, done: Completions, temperature: float) -> None:
        """Raise UserError unless the first responses come from `model`'s distribution."""
        columns = zip(prompt_ids, done.response_ids, done.logprobs, strict=True)
        gap = logprob_gap(model, list(columns)[:CHECKED_ROWS], temperature)
        remedy = "It needs --logprobs-mode processed_logprobs, and this run's base and precision"
        far = "nats a token from those of the model here"
        # NaN fails too
        if not gap <= LARGEST_GAP:
            raise UserError(f"{self.service}: its log-probabilities are {gap:.2g} {far}. {remedy}")
        if gap > ROUNDING:
            say_once(
                f"warning: {self.service}: its log-probabilities are more than {ROUNDING} {far}. {remedy}; see the "
                "metric rollout/logprob_gap"
            )


def active_adapter(model: nn.Module) -> str | None:
    """Return the LoRA adapter that a pass through the model uses, or None where it is disabled.

    Raises UserError for a model without one.
    """
    # roles switch layers, not the model (`rlhf.roles.one_base`)
    layer = next((m for m in model.modules() if isinstance(m, LoraLayer)), None)
    if layer is None:
        raise UserError("'vllm_url': LoRA adapters can be handed over, and this model has none")
    return None if layer.disable_adapters else layer.active_adapters[0]


@torch.no_grad()
def logprob_gap(
    model: nn.Module, rows: list[tuple[list[int], list[int], list[float]]], temperature: float
) -> float:
    """Return the mean over tokens of |given - the model's log-probability|, nats.

    rows: prompt, response, and the log-probabilities given to its tokens.
    """
    was_training = model.training
    model.eval()
    device, gaps = next(model.parameters()).device, []
    for prompt, response, given in rows:
        ids = torch.tensor([prompt + response], device=device)
        logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
        own = (logits.float() / temperature).log_softmax(-1)
        own = own.gather(-1, ids[0, len(prompt) :, None]).squeeze(-1)
        gaps.append((own.cpu() - torch.tensor(given)).abs())
    model.train(was_training)
    return float(torch.cat(gaps).mean())

"""The policies that are served: adapters of one base by name, and the base itself."""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from rlhf.compare.runs import load_policies
from rlhf.engines import batched
from rlhf.engines.merged import merged
from rlhf.engines.sampling import Completions, EachToken, Sampling
from rlhf.errors import UserError, near_file
from rlhf.model.adapters import use_adapter
from rlhf.model.files import adapter_base, is_adapter, read_identity
from rlhf.model.loading import context_length
from rlhf.model.tokenizer import load_tokenizer, stop_ids
from rlhf.ranks.distributed import own_device
from rlhf.text import say_once, short_names


@dataclass
class Policy:
    """A policy that answers; within `context()` its `model` is that policy.

    limit: the tokens that its positions reach, prompt and answer together; None where nothing limits
    them. base: the name of the base that it is an adapter of, None for whole weights.
    """

    name: str
    model: nn.Module
    context: Callable[[], AbstractContextManager]
    tokenizer: Any
    # of its own, for a thread that decodes while another encodes: fast tokenizers allow no sharing
    decoder: Any
    stop_ids: list[int]
    limit: int | None
    base: str | None = None

    def generate(
        self,
        prompts: list[list[int]],
        keys: list[int],
        sampling: Sampling,
        each_token: EachToken,
        batch_size: int = 64,
    ) -> Completions:
        """Sample one answer per prompt with the engine of the programs that train."""
        pad_id = self.tokenizer.pad_token_id
        with self.context():
            return batched.generate(
                self.model,
                prompts,
                keys,
                sampling,
                self.stop_ids,
                pad_id,
                batch_size=batch_size,
                each_token=each_token,
            )

    def room(self, prompt: list[int], wanted: int | None, usual: int) -> int:
        """Return how many tokens an answer to `prompt` may have: those `wanted`, or else up to the
        `usual` ones where the model's positions reach. Raises UserError where they do not.
        """
        if self.limit is None:
            return wanted or usual
        left = self.limit - len(prompt)
        asked = wanted or min(usual, max(left, 1))
        if asked > left:
            raise UserError(
                f"{self.name} has positions for {self.limit} tokens; the prompt has {len(prompt)}, and the answer "
                f"may have {asked}"
            )
        return asked


def load(paths: list[str], *, with_bases: bool) -> list[Policy]:
    """Load the policies at `paths`, in that order, and with `with_bases` the bases of adapters behind
    them. Adapters of one base share its weights. Raises UserError where a path holds no policy.

    A policy has the name of its folder, with as many folders above it as tell it apart; a base that
    of its folder or its name on the Hub. A base answers with the tokenizer and the template of the first of
    its adapters.
    """
    paths = list(dict.fromkeys(str(Path(path)) for path in paths))
    for path in paths:
        # what is in no folder here may be a name of the Hub
        if "/" in path and Path(path).parent.is_dir() and not Path(path).exists():
            raise UserError(f"{path}: no such run{near_file(path)}")
    # requests name a policy by these
    names = dict(zip(paths, _names(paths), strict=True))
    bases = {path: _base_of(path) for path in paths}
    # the place of a base -> the adapters on it
    adapters: dict[str, list[str]] = {}
    for path, base in bases.items():
        if base:
            adapters.setdefault(_place(base), []).append(path)

    # a base that is given beside its adapters is loaded once, with them
    given = {_place(path): path for path in paths if not bases[path]}
    loaded = [path for path in paths if bases[path] or _place(path) not in adapters]
    # adapters with their base behind them: load_policies shares its weights
    device = own_device()
    policies: dict[str, Policy] = {}
    for path, made in zip(loaded, load_policies(loaded, device, 1, 1), strict=True):
        policies[path] = _policy(names[path], path, *made)

    more = []
    for place, own in adapters.items():
        first = policies[own[0]]
        path = given.get(place)
        if path:
            name = names[path]
        else:
            name = _base_name(own[0], bases[own[0]], set(names.values()))
        # the first adapter's model without an adapter
        base = replace(first, name=name, context=partial(use_adapter, first.model, None))
        base.decoder = copy.deepcopy(first.tokenizer)
        for adapter in own:
            policies[adapter].base = name
        if path:
            policies[path] = base
        elif with_bases:
            more.append(base)
    return list(map(_folded, (*map(policies.get, paths), *more)))


def _policy(name: str, path: str, model: nn.Module, context: Callable) -> Policy:
    tokenizer = load_tokenizer(path)
    return Policy(
        name=name,
        model=model,
        context=context,
        tokenizer=tokenizer,
        decoder=copy.deepcopy(tokenizer),
        stop_ids=stop_ids(tokenizer, model),
        limit=context_length(model.config),
    )


def _base_of(path: str) -> str | None:
    return adapter_base(path) if is_adapter(path) else None


def _place(path: str) -> str:
    return str(Path(path).resolve())


def _names(paths: list[str]) -> list[str]:
    """Return a short name of each folder; what is no folder here, such as a Hub name, stays whole."""
    folders = [path for path in paths if Path(path).exists()]
    resolved = [str(Path(path).resolve()) for path in folders]
    short = dict(zip(folders, short_names(resolved), strict=True))
    return [short.get(path, path) for path in paths]


def _base_name(path: str, base: str, taken: set[str]) -> str:
    """Return the name of the base of the adapter at `path`: a GGUF file is converted to a folder
    whose name says nothing.
    """
    named = read_identity(path).get("base_model_name_or_path") or base
    is_folder = Path(base).exists()
    name = Path(named).name.removesuffix(".gguf") if is_folder else named
    return name if name not in taken else named


def _folded(policy: Policy) -> Policy:
    """Return a policy with its adapter folded into copies of the weights that it changes, for as
    long as it is served; as it was where they cannot be, or do not fit.
    """
    with policy.context():
        model, reason = merged(policy.model)
    if reason:
        say_once(f"{policy.name}: its adapter stays beside the weights, which is slower: {reason}")
        return policy
    return replace(policy, model=model, context=nullcontext)

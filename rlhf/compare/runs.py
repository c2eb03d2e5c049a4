"""The runs of a comparison: their options and results, what they learnt from, their policies."""

import itertools
import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from rlhf.data.records import Prompt, prompt_group
from rlhf.errors import UserError
from rlhf.model.files import adapter_base, read_identity, require_policy
from rlhf.runs.checkpoint import FOLDER
from rlhf.runs.rows import TRAINED_ON
from rlhf.values import read_yaml

# the keys that say what a scorer is; "openai" first, since it has a "model" of its own
SCORERS = ("openai", "model", "ensemble", "voice", "function", "rule", "http")


def run_folder(path: str | Path) -> Path:
    """Return the run's folder, of which `path` may be a checkpoint."""
    path = Path(path)
    # a checkpoint has no options of its own
    is_checkpoint = path.parent.name == FOLDER and not (path / "config.yaml").is_file()
    return path.parent.parent if is_checkpoint else path


def run_config(path: str | Path) -> dict[str, Any]:
    """Return the resolved options of a run, or of the run that a checkpoint is of; empty where
    there are none.
    """
    file = run_folder(path) / "config.yaml"
    return read_yaml(file) if file.is_file() else {}


def run_result(path: str | Path) -> dict[str, Any]:
    """Return result.json of a run; empty where there is none."""
    file = Path(path) / "result.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def world_seed(path: str) -> int | None:
    """Return the seed of the sandbox world that a run's base comes from; None of other bases."""
    base = read_identity(path).get("base_model_name_or_path")
    file = Path(base).parent / "world.json" if base else None
    if file is None or not file.is_file():
        return None
    world = json.loads(file.read_text())
    return world.get("settings", {}).get("world_seed")


def hashes(path: str) -> set[str]:
    """Return the groups of prompts that the run in this folder was trained on (see
    rlhf/runs/rows.py).
    """
    file = run_folder(path) / TRAINED_ON
    return set(file.read_text().split()) if file.is_file() else set()


def trained_scorers(runs: Sequence[str]) -> list[dict]:
    """Return every scorer that a run learnt from, from its config.yaml; those of weight 0 were only
    evaluated.
    """
    proxies: list[dict] = []
    for path in runs:
        for spec in run_config(path).get("reward") or []:
            if spec.get("weight", 1.0) and spec not in proxies:
                proxies.append(spec)
    return proxies


def identities(spec: dict) -> set[tuple[str, str]]:
    """Return (kind, what) of a scorer and of each member of an ensemble: specifications that share
    one share one.
    """
    kind = next((name for name in SCORERS if name in spec), "")
    if kind in ("model", "ensemble"):
        from rlhf.model.weights import folder_fingerprint

        found = set()
        for folder in folders(spec):
            # by its weights: a copy elsewhere is the same model
            what = folder_fingerprint(folder) if Path(folder).is_dir() else folder
            found.add(("model", what))
        return found
    what = str(spec.get(kind, ""))
    # one address may serve many models
    if kind == "openai":
        what += f" {spec.get('model')}"
    # one file may be written as several paths
    if kind == "voice":
        what = str(Path(what).resolve())
    return {(kind, what)}


def folders(spec: dict) -> list[str]:
    """Return the folders of the reward models that a scorer reads."""
    # there it is the name of a model behind an address
    if "openai" in spec:
        return []
    return [spec["model"]] if "model" in spec else list(spec.get("ensemble", []))


def unseen(runs: Sequence[str], records: list[Prompt], sources: list[str]) -> list[Prompt]:
    """Return the prompts that no run, and no reward model a run learnt from, was trained on; print
    what is dropped.
    """
    # what a reward model learnt from, the policy learnt from too
    trained = set().union(*map(hashes, runs))
    for spec in trained_scorers(runs):
        trained |= set().union(*map(hashes, folders(spec)))
    kept = [record for record in records if prompt_group(record.prompt) not in trained]
    if len(kept) < len(records):
        print(
            f"{len(records) - len(kept)} of {len(records)} test prompts left out: a run was trained on them"
        )
    if not kept:
        raise UserError(
            f"{', '.join(sources)}: no test prompts that the runs have not been trained on. Give prompts of "
            "groups they held out (the same file and fractions), or new ones with a split column"
        )
    return kept


def check_judges(
    runs: Sequence[str], gold: Sequence[dict] = (), referee: Sequence[dict] = ()
) -> None:
    """Raise UserError if what is to decide is something that a run learnt from, or learnt from the
    same pairs; the first run is the SFT policy.
    """
    trained = set().union(*map(identities, trained_scorers(runs)))
    for option_name, specs in (("gold", gold), ("referee", referee)):
        for spec in specs:
            if identities(spec) & trained:
                raise UserError(
                    f"{option_name} {spec}: a run was trained on it, so it cannot decide; show it as 'others'"
                )
    # SFT's own prompts are not preferences
    learnt = set().union(*map(hashes, runs[1:]))
    for folder in itertools.chain.from_iterable(map(folders, referee)):
        common = hashes(folder) & learnt
        if common:
            raise UserError(
                f"referee {folder}: {len(common)} of its training prompts are also those of a run. Train it on "
                "the other half of the groups: --half b for the referee, --half a for the rest"
            )


def load_policies(
    paths: list[str],
    device: Any,
    max_prompt_length: int,
    max_response_length: int,
    dtype: str = "auto",
) -> list[tuple[Any, Callable]]:
    """Return (model, context in which it is the policy) for each run; adapters of one base share
    it.

    dtype: of the base; "auto" is bfloat16 on a GPU. Raises UserError where the longest prompt and
    response exceed a model's positions.
    """
    from rlhf.model.adapters import load_adapter, use_adapter
    from rlhf.model.loading import check_context, check_same_base, load_model, trained_on
    from rlhf.ranks.distributed import base_dtype
    from rlhf.startup import model_loaded

    dtype = base_dtype(dtype, device)
    # base, and how it is kept -> the model as it was loaded, and with its adapters
    shared: dict[tuple[str, str | None], tuple[Any, Any]] = {}
    policies = []
    for number, path in enumerate(paths):
        context: Callable = nullcontext
        if (Path(path) / "adapter_config.json").is_file():
            require_policy(path)
            kept, name = trained_on(read_identity(path), path), f"run{number}"
            base = (str(Path(adapter_base(path)).resolve()), kept)
            initial, model = shared.get(base, (None, None))
            if initial is None:
                initial = load_model(path, dtype)
                model = initial.model
            else:
                check_same_base(path, initial)
            model = load_adapter(model, path, name=name)
            shared.setdefault(base, (initial, model))
            context = partial(use_adapter, model, name)
        else:
            model = load_model(path, dtype).model
        check_context(model, path, max_prompt_length, max_response_length)
        model.to(device).eval()
        policies.append((model, context))
    model_loaded(policies[0][0])
    return policies

"""`rlhf reward best-of-n RUN`: does the score that counts still rise where the reward model's does?"""

import contextlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.compare.runs import check_judges, identities, run_config
from rlhf.config import SEED, option
from rlhf.data.records import Scorer
from rlhf.errors import UserError
from rlhf.files import dumps, lock_folder, unlock_folder


@dataclass(kw_only=True)
class BestOfNConfig:
    """Score the best of n answers of a policy by a reward model and by what counts, before any RL."""

    run: str = option(help="the reward model: the folder of its run, or a Hub name")
    prompts: list[str] = option(
        help="files, stores or Hub names with prompts; their test split is used"
    )
    gold: list[dict] = option(
        help="the scores that count: the true reward, a referee or scores to watch, e.g. "
        "[{voice: configs/voices/shop.yaml}] or [{model: runs/referee}]"
    )
    policy: str | None = option(
        None, "the policy that answers; default: the one that the reward model's run started from"
    )
    samples: int = option(128, "answers to each prompt: the largest n", low=2)
    n_prompts: int | None = option(
        None, "number of test prompts, chosen by the hash of their group; default: all", low=1
    )
    output_dir: str | None = option(
        None, "where the answers, best_of_n.json and the page go; default: best-of-n in the run"
    )
    temperature: float | None = option(
        None, "of sampling: what RL will sample at; default: as the runs", above=0
    )
    max_prompt_length: int | None = option(
        None, "tokens; longer prompts are dropped and counted; default: as the runs", low=1
    )
    max_response_length: int | None = option(None, "tokens with EOS; default: as the runs", low=1)
    batch_size: int = option(64, "answers generated, or scored, together", low=1)
    validation_fraction: float | None = option(
        None, "share of validation groups; default: as the runs had it", low=0, high=1
    )
    test_fraction: float | None = option(
        None, "share of test groups; default: as the runs had it", low=0, high=1
    )
    seed: int = option(0, "of sampling", **SEED)
    json: bool = option(False, "print the results as JSON instead of the table")

    @property
    def runs(self) -> list[str]:
        """The runs whose options hold where none is given (`shared_options`)."""
        return [str(self.policy), self.run]


def best_of_n(
    config: BestOfNConfig,
    build_scorer: Callable[..., Scorer],
    check_scorers: Callable[..., None],
) -> dict[str, Any]:
    """Sample, score and write the page; return best_of_n.json's content.

    `build_scorer(specs, tokenizer)` makes scorers, `check_scorers(specs)` refuses wrong ones.
    """
    from rlhf.best_of_n.page import print_table, write_page

    folder = Path(config.output_dir or Path(config.run) / "best-of-n")
    # with --json, what is said on the way must not stand beside the JSON
    with contextlib.redirect_stdout(sys.stderr if config.json else sys.stdout):
        result = measure(config, folder, build_scorer, check_scorers)
    page = write_page(result, folder)
    unlock_folder(folder)
    if config.json:
        print(dumps(result, indent=2))
    else:
        print_table(result)
        print(f"\nthe page: {page}")
    return result


def measure(
    config: BestOfNConfig,
    folder: Path,
    build_scorer: Callable[..., Scorer],
    check_scorers: Callable[..., None],
) -> dict[str, Any]:
    """Return what the page says, from answers and scores that are kept in `folder`, which it locks."""
    from rlhf.best_of_n.curve import repeated_share, summarise
    from rlhf.best_of_n.samples import Drawing, sample_answers, score_answers
    from rlhf.compare.measure import shared_options, test_prompts
    from rlhf.engines.sampling import Sampling
    from rlhf.model.tokenizer import load_tokenizer

    config.policy = config.policy or policy_of(config.run)
    # what cannot work is refused before anything is sampled
    specs = scorers_of(config, check_scorers)
    shared = shared_options(config)
    tokenizer = load_tokenizer(config.policy)
    prompts, _ = test_prompts(config, shared, tokenizer)
    drawing = Drawing(
        policy=config.policy,
        sampling=Sampling(shared["max_response_length"], shared["temperature"]),
        samples=config.samples,
        seed=config.seed,
        max_prompt_length=shared["max_prompt_length"],
        batch_size=config.batch_size,
    )

    # two calls would add their rows to one file
    lock_folder(folder)
    answers = sample_answers(folder / "answers.jsonl", drawing, prompts, tokenizer)
    scores = score_answers(
        folder / "scores.jsonl",
        answers,
        specs,
        lambda: build_scorer(specs, tokenizer),
        config.batch_size,
    )
    proxy = scores.pop("proxy")
    groups = [row["group"] for row in answers]
    return {
        "reward": config.run,
        "policy": config.policy,
        "scorers": specs,
        "prompts": len(answers),
        "groups": len(set(groups)),
        "samples": config.samples,
        "sampling": {"temperature": shared["temperature"], "seed": config.seed},
        "repeated": repeated_share([row["responses"] for row in answers]),
        **summarise(proxy, scores, groups),
    }


def policy_of(run: str) -> str:
    """Return the policy that the reward model's run started from. UserError where it is not known."""
    policy = run_config(run).get("model_name_or_path")
    if not policy:
        raise UserError(
            f"{run}: has no config.yaml that says which policy it started from; give it: --policy runs/sft"
        )
    return str(policy)


def scorers_of(config: BestOfNConfig, check_scorers: Callable[..., None]) -> list[dict[str, Any]]:
    """Return the specifications of the proxy and of the scores that count, each with its name.

    Raises UserError for one that cannot be built, has a name twice, is the reward model itself, or
    has learnt from its prompts.
    """
    if not config.gold:
        raise UserError("'gold' is empty, expected at least one score that counts")
    # what chooses among the answers
    proxy = {"model": config.run, "name": "proxy"}
    golds = []
    for number, spec in enumerate(config.gold, 1):
        golds.append({"name": "gold" if number == 1 else f"gold{number}", **spec})
    check_scorers(golds, where="gold")
    for spec in golds:
        if identities(spec) & identities(proxy):
            raise UserError(
                f"gold, '{spec['name']}': is the reward model itself, which cannot judge itself"
            )
        if spec["name"] == "proxy":
            raise UserError("gold: 'proxy' is the name of the reward model; give another 'name'")
    check_scorers([proxy], where="run")
    check_judges(config.runs, referee=config.gold)
    return [proxy, *golds]

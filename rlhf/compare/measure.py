"""`rlhf compare RUN RUN ...`: the same test prompts, the same sampling, every score, for several
trained policies.
"""

import itertools
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.compare.results import (
    Results,
    check_finite,
    measured_point,
    prompt_key,
)
from rlhf.compare.runs import (
    check_judges,
    identities,
    load_policies,
    run_config,
    run_result,
    trained_scorers,
    unseen,
    world_seed,
)
from rlhf.config import SEED, option
from rlhf.data.load import fingerprint, load
from rlhf.data.records import Prompt, Scorer
from rlhf.data.split import first_by_hash
from rlhf.errors import UserError, near_file
from rlhf.model.files import check_model
from rlhf.text import short_names

# options that are the runs' own, and what holds where no run says
FOLLOWED = {
    "validation_fraction": 0.05,
    "test_fraction": 0.1,
    "temperature": 1.0,
    "max_prompt_length": 512,
    "max_response_length": 512,
}


@dataclass(kw_only=True)
class CompareConfig:
    """Compare trained policies on held-out prompts; the first is the reference (the SFT policy).

    Several swept values and seeds of each method at one budget: rlhf experiment run FILE.
    """

    runs: list[str] = option(help="folders of the policies, the SFT policy first")
    prompts: list[str] = option(
        help="files, stores or Hub names with prompts; their test split is used"
    )
    output_dir: str = option("runs/compare", "where report.md, report.json and the plots go")
    gold: list[dict] = option(
        [], "the true reward where it is known, e.g. [{voice: configs/voices/shop.yaml}]"
    )
    referee: list[dict] = option(
        [], "a reward model that no run has seen, e.g. [{model: runs/referee}]; decides"
    )
    others: list[dict] = option([], "further scorers to show")
    judge: dict = option(
        {},
        "a judge of pairs, asked in both orders: {openai: URL, model: NAME}, {http: URL} or "
        "{function: module:function}",
    )
    votes: str | None = option(
        None,
        "a preference store: which policy its votes prefer and how far annotators agree; votes on the "
        "same answers correct the judge",
    )
    n_prompts: int | None = option(
        None, "number of test prompts, chosen by the hash of their group; default: all", low=1
    )
    samples_per_prompt: int = option(
        2, "responses of each policy to each prompt; win rates need at least 2", low=1
    )
    temperature: float | None = option(
        None,
        "of sampling; the KL is that of the sampled distributions; default: as the runs",
        above=0,
    )
    max_prompt_length: int | None = option(
        None, "tokens; longer prompts are dropped and counted; default: as the runs", low=1
    )
    max_response_length: int | None = option(None, "tokens with EOS; default: as the runs", low=1)
    batch_size: int = option(64, "responses generated together", low=1)
    validation_fraction: float | None = option(
        None, "share of validation groups; default: as the runs had it", low=0, high=1
    )
    test_fraction: float | None = option(
        None, "share of test groups; default: as the runs had it", low=0, high=1
    )
    seed: int = option(0, "of sampling", **SEED)

    def validate(self) -> None:
        if len(self.runs) < 2:
            raise UserError(
                "compare needs at least two runs: the SFT policy and one to compare with it"
            )
        # one score decides
        if self.gold and self.referee:
            raise UserError(
                "'gold' and 'referee' both given: where the true reward is known, no referee is needed"
            )


def compare(config: CompareConfig, build_scorer: Callable[..., Scorer]) -> dict[str, Any]:
    """Sample, score and report; return report.json's content. `build_scorer(specs, tokenizer)`
    makes scorers.
    """
    # before torch is imported
    for path in config.runs:
        if not Path(path).is_dir():
            raise UserError(f"{path}: no such run{near_file(path)}")
        check_model(path)

    from rlhf.compare.summary import summarise
    from rlhf.engines.sampling import Sampling
    from rlhf.model.tokenizer import load_tokenizer
    from rlhf.report.files import print_report, write_files

    # what to sample, and what to score it by; refused before anything is loaded
    shared = shared_options(config)
    specs, kinds, judge = scores_of(config)
    _check_judge_and_votes(config)
    tokenizer = load_tokenizer(config.runs[0])
    prompts, counts = test_prompts(config, shared, tokenizer)
    sampling = Sampling(shared["max_response_length"], shared["temperature"])

    rows = sample_runs(
        config,
        prompts,
        sampling,
        tokenizer,
        build_scorer(specs, tokenizer),
        shared["max_prompt_length"],
    )
    for name in _parts_everywhere(rows):
        kinds.setdefault(name, "other")

    # everything that the report needs to be repeated
    meta = meta_of(config, list(rows))
    meta["fingerprints"]["prompts"] = fingerprint([row["record"] for row in prompts])
    meta["sampling"] = {
        "temperature": sampling.temperature,
        "max_new_tokens": sampling.max_new_tokens,
    }
    meta["rows"]["prompts"] = counts
    results = results_of_runs(config.runs, rows, kinds, judge, meta)
    report = summarise(results)
    if config.judge:
        from rlhf.judge.policies import judge_policies

        report["judge_of_pairs"] = judge_policies(
            config.judge, results.methods, results, report, Path(config.output_dir), config.votes
        )
    write_files(report, Path(config.output_dir))
    write_samples(Path(config.output_dir) / "samples.jsonl", rows)
    print_report(report, Path(config.output_dir))
    return report


def _check_judge_and_votes(config: CompareConfig) -> None:
    """Raise UserError if the judge of pairs or the store of votes cannot be used; otherwise that
    would be found after hours of sampling.
    """
    if config.judge:
        from rlhf.judge.judges import load_judge

        load_judge(config.judge)
    if config.votes:
        from rlhf.data.sources import split_event
        from rlhf.data.store import Store

        Store.open(split_event(config.votes)[0], readonly=True).close()


def _parts_everywhere(rows: dict[str, list]) -> list[str]:
    """Return the scores, and the parts of scores, that apply to every response of every run."""
    every_row = list(itertools.chain.from_iterable(rows.values()))
    found = []
    for name in every_row[0].scores:
        values = [row.scores[name] for row in every_row]
        # nan: a part, such as a rule about refunds, that does not apply to this prompt
        if not any(map(math.isnan, values)):
            found.append(name)
    return found


def test_prompts(
    config: Any, shared: dict[str, Any], tokenizer: Any
) -> tuple[list[dict], dict[str, Any]]:
    """Return the encoded test prompts that no run has learnt from, chosen by hash, and their counts.

    config: has `runs`, `prompts` and `n_prompts`. shared: `shared_options`.
    """
    from rlhf.data.encode import encode, kept

    fractions = {name: shared[name] for name in ("validation_fraction", "test_fraction")}
    records = load(config.prompts, Prompt, split="test", **fractions)
    records = unseen(config.runs, records, config.prompts)
    encoded = encode(records, tokenizer, shared["max_prompt_length"])
    prompts = first_by_hash(kept(encoded, "prompts"), config.n_prompts)
    return prompts, {"read": len(records), "used": len(prompts), "dropped": dict(encoded[1])}


def sample_runs(
    config: CompareConfig,
    prompts: list[dict],
    sampling: Any,
    tokenizer: Any,
    scorer: Scorer,
    max_prompt_length: int,
) -> dict[str, list]:
    """Return run -> evaluation rows, all on the same prompts with the same sampling noise, KL to
    the first run.
    """
    from tqdm import tqdm

    from rlhf.evaluate import Evaluation
    from rlhf.model.packing import head_is_plain
    from rlhf.model.tokenizer import stop_ids
    from rlhf.ranks.distributed import DistributedContext, own_device

    # one process: the policies of a comparison are sampled in turn
    world = DistributedContext(device=own_device())
    policies = load_policies(config.runs, world.device, max_prompt_length, sampling.max_new_tokens)
    model, context = policies[0]
    evaluation = Evaluation(
        prompts=prompts,
        tokenizer=tokenizer,
        stop_ids=stop_ids(tokenizer, model),
        sampling=sampling,
        scorer=scorer,
        samples_per_prompt=config.samples_per_prompt,
        seed=config.seed,
        batch_size=config.batch_size,
        plain_head=head_is_plain(model),
    )
    rows = {}
    total = len(policies) * len(prompts) * config.samples_per_prompt
    with tqdm(total=total, desc="comparing", unit="response", mininterval=5) as bar:
        for name, (own_model, own_context) in zip(short_names(config.runs), policies, strict=True):
            # the first run is the reference of all, as a context of the same model or as another
            # model
            reference = context if own_model is model else model
            rows[name] = evaluation.run(own_model, own_context, reference, world, bar.update)
    return rows


def write_samples(path: Path, rows: dict[str, list]) -> None:
    """Write every response with its scores, one JSON object a line."""
    from rlhf.evaluate import sample_table

    with open(path, "w", encoding="utf-8") as file:
        for name, own in rows.items():
            for row in sample_table(own, len(own)):
                file.write(json.dumps({"policy": name, **row}, ensure_ascii=False) + "\n")


def results_of_runs(
    paths: list[str],
    rows: dict[str, list],
    kinds: dict[str, str],
    judge: str | None,
    meta: dict[str, Any],
) -> Results:
    """Return what the runs at `paths` did as `Results`: each run is a method of its own, the first
    one the initial policy, and all have one nominal seed, so that every interval is over groups.

    rows: run -> evaluation rows, in the order of `paths`. Raises UserError where a score that has a
    kind or the KL is not a finite number.
    """
    check_finite(rows, kinds)
    names = list(rows)
    # a prompt that is given twice counts once
    prompts = {(row.group, prompt_key(row.prompt)): row.prompt for row in rows[names[0]]}
    number = {asked: i for i, asked in enumerate(prompts)}
    points, methods = [], {}
    for name, path in zip(names, paths, strict=True):
        result = run_result(path)
        own = []
        for row in rows[name]:
            own.append(vars(row) | {"prompt": number[row.group, prompt_key(row.prompt)]})
        about = {"method": name, "swept": None, "last": True, "budget": meta["budgets"][name]}
        about |= {"seed": 0, "step": result.get("steps", 1)}
        # the first run is the initial policy
        if not points:
            about |= {"seed": None, "step": 0}
        points.append(measured_point(own, list(kinds), len(prompts), {}, **about))
        methods[name] = {
            "program": result.get("program", name),
            "swept": None,
            "swept_values": [],
            "baseline": False,
        }
    # the first run is where all differences are taken to
    methods.pop(names[0])
    return Results(
        kind="runs",
        points=points,
        groups=[group for group, _ in prompts],
        prompts=list(prompts.values()),
        score_kinds=dict(kinds),
        judge=judge,
        methods=methods,
        shared_budget={},
        meta={"name": f"{', '.join(names[1:])} against {names[0]}", **meta},
    )


def shared_options(config: CompareConfig) -> dict[str, Any]:
    """Return the options that follow the runs: as given, else as all runs had them. UserError if
    those differ.
    """
    configs = dict(zip(config.runs, map(run_config, config.runs), strict=True))
    result = {}
    for name, default in FOLLOWED.items():
        given = getattr(config, name)
        had = {path: options[name] for path, options in configs.items() if name in options}
        if given is None and len(set(had.values())) > 1:
            why = (
                "what is test for one was training for another"
                if "fraction" in name
                else "they cannot be compared"
            )
            raise UserError(
                f"the runs differ in '{name}' ({had}): {why}. Say which one holds: --{name}"
            )
        trained_with = next(iter(had.values()), default)
        result[name] = trained_with if given is None else given
        # the shares of the splits are not part of sampling: no message for them
        others = {path: value for path, value in had.items() if value != result[name]}
        if others and "fraction" not in name:
            print(f"'{name}' is {result[name]}; trained with another: {others}")
    return result


def scores_of(config: CompareConfig) -> tuple[list[dict], dict[str, str], str | None]:
    """Return the scorer specifications, the kind of each named score, and the score that decides.

    Every scorer that a run trained on is found in its config.yaml and marked `proxy`.
    """
    check_judges(config.runs, config.gold, config.referee)
    groups = {
        "gold": config.gold,
        "referee": config.referee,
        "proxy": trained_scorers(config.runs),
        "other": config.others,
    }
    specs, kinds = [], {}
    for kind, group in groups.items():
        for spec in group:
            wanted = spec.get("name") or kind
            # several of them may be shown: each is called after what it reads
            if kind == "other" and not spec.get("name"):
                wanted = min(identities(spec))[1].replace("/", "_")
            # gold, gold2, gold3
            name, number = wanted, 1
            while name in kinds:
                number += 1
                name = f"{wanted}{number}"
            specs.append({**spec, "name": name})
            kinds[name] = kind
    if not specs:
        raise UserError(
            "no score to compare by: give --gold, --referee or --others, for example --others '[{rule: length}]'"
        )
    judge = next((name for name in kinds if kinds[name] in ("gold", "referee")), None)
    return specs, kinds, judge


def meta_of(config: CompareConfig, names: list[str]) -> dict[str, Any]:
    """Return the seeds, budgets, rows, options and versions of each run, for the report."""
    results = dict(zip(names, map(run_result, config.runs), strict=True))
    budgets, versions, fingerprints, rows = {}, {}, {}, {}
    for name, result in results.items():
        counters = result.get("budget", {})
        budgets[name] = {full.removeprefix("budget/"): counters[full] for full in counters}
        versions = result.get("versions", versions)
        fingerprints[name], rows[name] = result.get("data", {}), result.get("rows", {})
    # each seed once, in order
    seeds = dict.fromkeys(result.get("seed") for result in results.values())
    worlds = dict.fromkeys(map(world_seed, config.runs))
    meta = {
        "seeds": {"run": _known(seeds), "world": _known(worlds)},
        "budgets": budgets,
        "versions": versions,
        "fingerprints": fingerprints,
        "configs": dict(zip(names, map(run_config, config.runs), strict=True)),
        "rows": rows,
    }
    # how far people agree bounds how far any judge can
    if config.votes:
        from rlhf.voting.rates import votes_of_store

        meta |= votes_of_store(config.votes)
    return meta


def _known(seeds: Iterable[int | None]) -> list[int]:
    return [seed for seed in seeds if seed is not None]

"""The options of an experiment: which methods, at which strengths, with which seeds, at which budget, measured how."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rlhf.config import SEED, option
from rlhf.errors import UserError, did_you_mean, near_file

PROGRAMS = ("dpo", "ppo")  # those that train a policy
LENGTH = {"dpo": "max_steps", "ppo": "total_episodes"}  # the option by which a run's length is set
COUNTERS = ("flops", "tokens_trained", "seconds")
# what the experiment decides for every program; a method that set one of them would not be compared like for like
OURS = (
    *("model_name_or_path", "data", "output_dir", "overwrite_output_dir", "resume", "seed", "half", "save_steps"),
    *("save_total_limit", "validation_fraction", "test_fraction", "max_prompt_length", "max_response_length"),
    *("temperature", "on_error"),
)
SIZES = ("max_steps", "total_episodes", "rollout_batch_size")  # from which a run's length follows
KEYS = {
    "pairs": {"data", "prompts", "sample", "annotate"},
    "method": {"program", "config", "sweep", "options", "eval_every"},
    "part": {"config", "options"},
    "budget": {"match", "total", "tolerance"},
    "judge": {"function", "http", "batch_size", "timeout", "retries", "token_env"},
}


@dataclass(kw_only=True)
class ExperimentConfig:
    """Compare methods of alignment on one foundation: every strength and seed is a run of its own."""

    output_dir: str = option(help="the folder of the experiment: runs, measurements and report")
    foundation: str = option(help="the policy that every method starts from and KL is measured to: an SFT run")
    pairs: dict = option(
        help="preference pairs: {data: [FILE]}; or {prompts: [FILE], sample: CONFIG, annotate: CONFIG}: sampled from "
        "the foundation and judged by the sandbox's annotators, anew for each seed"
    )
    prompts: list[str] = option(help="files, stores or Hub names with prompts; their test split is what is measured on")
    methods: dict[str, dict] = option(
        help="name: {program: dpo|ppo, config: FILE, sweep: {OPTION: [values]}, options: {...}, eval_every: steps}; "
        "best_of_n: {sweep: {n: [...]}}. The foundation is always measured"
    )
    seeds: list[int] = option([0, 1, 2], "run seeds: pairs (where sampled), reward model and methods", **SEED)
    reward: dict = option({}, "how the reward model of each seed is trained: {config: FILE, options: {...}}")
    budget: dict = option(
        {"match": "none"},
        "match: flops, tokens_trained, seconds or none; total: what each run may spend in all, pairs and reward model "
        "counted in full; tolerance: 0.1. The lengths of the runs follow",
    )
    checkpoints: int = option(4, "how often each run is measured, its end counted, where eval_every is not set", low=1)

    gold: list[dict] = option([], "the true reward where it is known, e.g. [{voice: configs/voices/shop.yaml}]")
    referee: list[dict] = option([], "a reward model that no method has seen, e.g. [{model: runs/referee}]; decides")
    train_referee: dict = option(
        {}, "train the referee here, on the half of the groups that no method sees: {config: FILE, options: {...}}"
    )
    others: list[dict] = option([], "further scorers to show")
    judge: dict = option({}, "a judge of pairs, asked in both orders: {function: module:function} or {http: URL}")
    perplexity: dict[str, list[str]] = option(
        {}, "held-out texts by name, e.g. {sft: [FILE], stories: [FILE]}: what the policy has forgotten"
    )
    n_prompts: int | None = option(None, "so many test prompts, by the hash of their group; default: all", low=2)
    samples_per_prompt: int = option(2, "responses of each policy to each prompt", low=1)
    temperature: float = option(1.0, "of sampling, in training and measuring", above=0)
    max_prompt_length: int = option(512, "tokens; longer prompts are dropped and counted", low=1)
    max_response_length: int = option(512, "tokens with EOS", low=1)
    batch_size: int = option(64, "responses generated together when measuring", low=1)
    validation_fraction: float = option(0.05, "share of groups held out for looking while training", low=0, high=1)
    test_fraction: float = option(0.1, "share of groups that only the measuring reads", low=0, high=1)
    on_error: Literal["stop", "skip"] = option("stop", "what to do with rows that cannot be used", old_name="on_bad")

    processes: int = option(1, "runs at a time; each is a process of its own", low=1, resume="free")
    launcher: str = option(
        "deepspeed --num_accelerators 1", "how a program is started; 'python' for none", resume="free"
    )
    redo: bool = option(False, "set aside what was made with other options, and make it anew", resume="free")
    report_to: Literal["none", "wandb"] = option(
        "none", "wandb: the report as tables, offline without a key", resume="free"
    )
    project: str | None = option(None, "W&B project; default: WANDB_PROJECT, else rlhf", resume="free")

    def validate(self) -> None:
        for method in self.methods.values():  # files written before "sweep" had that name
            if isinstance(method, dict) and "strength" in method:
                method["sweep"] = method.pop("strength")
        for name in ("pairs", "budget", "judge"):
            known_keys(getattr(self, name), KEYS[name], name)
        self.output_dir = os.path.normpath(self.output_dir)  # 'runs/x/' is no other place than 'runs/x'
        for name in ("reward", "train_referee"):
            known_keys(getattr(self, name), KEYS["part"], name)
            check_options(getattr(self, name), name, set(OURS) - {"model_name_or_path"})  # a referee may be larger
        for name, method in self.methods.items():
            check_method(name, method)
        check_pairs(self.pairs)
        check_trials(self)
        check_budget(self)
        if len(set(self.seeds)) < len(self.seeds) or not self.seeds or min(self.seeds) < 0:
            raise UserError(f"'seeds' is {self.seeds}, expected different whole numbers from 0 on")
        if len(self.seeds) == 1 and self.seeds[0] > 1:  # 'seeds: 5' is read as the list [5]
            raise UserError(
                f"'seeds' is the one seed {self.seeds[0]}: for as many seeds write [0, 1, ..., {self.seeds[0] - 1}]; a "
                "single one is 0 or 1"
            )
        if not self.launcher.strip():
            raise UserError("'launcher' is empty, expected 'deepspeed --num_accelerators 1', or 'python' for none")
        if self.gold and (self.referee or self.train_referee):
            raise UserError("'gold' and a referee both given: where the truth is known no referee decides")
        if self.referee and self.train_referee:
            raise UserError("'referee' names one and 'train_referee' makes one: give one of them")
        if self.judge and len({"function", "http"} & set(self.judge)) != 1:
            raise UserError(f"'judge' is {self.judge}, expected {{function: module:function}} or {{http: URL}}")
        for name in self.trained:
            spec = self.methods[name]
            if spec["program"] == "ppo" and not self.reward and "reward" not in spec.get("options", {}):
                raise UserError(
                    f"methods: '{name}' needs a reward: give 'reward: {{config: configs/reward.yaml}}', or its own "
                    "options: {reward: [...]}"
                )
        if "best_of_n" in self.methods and not self.reward:
            raise UserError("methods: 'best_of_n' chooses by the reward model; give 'reward: {config: FILE}'")

    @property
    def trained(self) -> list[str]:
        """The methods that train a policy."""
        return [name for name, spec in self.methods.items() if "program" in spec]

    @property
    def matched(self) -> str | None:
        """The counter that is equal for all runs, or None."""
        return None if self.budget.get("match", "none") == "none" else self.budget["match"]

    @property
    def halves(self) -> bool:
        """Whether the methods learn on one half of the groups and the referee on the other."""
        return bool(self.train_referee)

    @property
    def pool(self) -> int:
        """Responses of the foundation to each prompt: those it is measured by, and beside them enough for the largest n
        of best_of_n, which is not to meet its own candidates."""
        spec = self.methods.get("best_of_n")
        return self.samples_per_prompt * (1 + (max(map(int, sweep_of(spec)[1])) if spec else 0))


def sweep_of(method: dict[str, Any]) -> tuple[str, list[float]]:
    """The option that varies, and its values."""
    ((name, values),) = method["sweep"].items()
    return name, values


def check_method(name: str, method: Any) -> None:
    """Raises UserError if the method is not described as `methods` expects."""
    where = f"methods: '{name}'"
    known_keys(method, KEYS["method"], where)
    swept = method.get("sweep")
    values = next(iter(swept.values())) if isinstance(swept, dict) and len(swept) == 1 else None
    if isinstance(values, list):
        values[:] = [as_number(v) for v in values]
    # trials are named by %g, so that is where they have to differ
    if not isinstance(values, list) or not values or None in values or len({f"{v:g}" for v in values}) < len(values):
        raise UserError(
            f"{where}: 'sweep' is {swept!r}, expected one option with different values: {{beta: [0.1, 0.5]}}"
        )
    if not name.replace("_", "").isalnum() or name == "sft":
        raise UserError(f"{where}: a name has letters, digits and '_' alone, and 'sft' is the foundation's")
    if name == "best_of_n":
        if set(method) != {"sweep"} or set(swept) != {"n"} or not all(v == int(v) >= 1 for v in values):
            raise UserError(f"{where}: expected {{sweep: {{n: [2, 4, 16]}}}} and nothing else")
        return
    if method.get("program") not in PROGRAMS:
        raise UserError(f"{where}: 'program' is {method.get('program')!r}, expected one of {', '.join(PROGRAMS)}")
    check_options(method, where, set(OURS), swept)
    size = next((key for key in swept if key in SIZES), None)
    if size:
        raise UserError(f"{where}: 'sweep' is '{size}', the length of a run, which is the same for all strengths")
    every = method.get("eval_every")
    if every is not None and not (isinstance(every, int) and every >= 1):
        raise UserError(f"{where}: 'eval_every' is {every!r}, expected a number of steps")


def check_options(part: dict, where: str, ours: set[str], swept: Any = ()) -> None:
    """Raises UserError if a part's options are no mapping, or one of them is the experiment's to set."""
    options = part.get("options", {})
    if not isinstance(options, dict):
        raise UserError(f"{where}: 'options' is {options!r}, expected a mapping such as {{learning_rate: 1e-4}}")
    taken = [key for key in (*options, *swept) if key in ours]
    if taken:
        raise UserError(f"{where}: '{taken[0]}' is set by the experiment, the same for all; see its own options")


def check_pairs(pairs: dict) -> None:
    for key in ("data", "prompts"):
        if isinstance(pairs.get(key), str):
            pairs[key] = [pairs[key]]
    given, made = "data" in pairs, "sample" in pairs
    if given == made or (given and set(pairs) != {"data"}) or (made and not {"prompts", "annotate"} <= set(pairs)):
        raise UserError(
            "'pairs' needs either data: [FILE], or prompts: [FILE] with sample: CONFIG and annotate: CONFIG (both made "
            "anew for each seed)"
        )


def check_trials(config: ExperimentConfig) -> None:
    """Equal numbers of tuning trials: a method that may try more strengths finds a better one by luck."""
    counts = {name: len(sweep_of(config.methods[name])[1]) for name in config.trained}
    if not counts:
        raise UserError("'methods' trains nothing; for example dpo: {program: dpo, config: FILE, sweep: {beta: [...]}}")
    if config.matched and len(set(counts.values())) > 1:
        raise UserError(
            f"'methods' gives unequal numbers of strengths ({', '.join(f'{n} {c}' for n, c in counts.items())}): "
            "matched methods get equal numbers of tuning trials. Give as many, or budget: {match: none}"
        )


def check_budget(config: ExperimentConfig) -> None:
    budget = config.budget
    match = budget.get("match", "none")
    if match not in (*COUNTERS, "none"):
        raise UserError(
            f"budget: 'match' is {match!r}, expected one of {', '.join(COUNTERS)}, none."
            + did_you_mean(str(match), COUNTERS)
        )
    if match == "none":
        return
    for key, default in (("total", None), ("tolerance", 0.1)):
        value = budget.get(key, default)
        try:
            number = float(value)  # YAML's 2e12 is a text
        except (TypeError, ValueError):
            number = math.nan
        if not 0 < number < math.inf:
            raise UserError(f"budget: '{key}' is {value!r}, expected a number above 0")
        budget[key] = number
    for name in config.trained:
        length = LENGTH[config.methods[name]["program"]]
        if length in config.methods[name].get("options", {}):
            raise UserError(f"methods: '{name}' sets '{length}', which follows from the matched budget; leave it out")


def known_keys(value: Any, known: set[str], where: str) -> None:
    """Raises UserError unless `value` is a mapping with none but the known keys."""
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected a mapping, found {value!r}")
    for key in value:
        if key not in known:
            raise UserError(f"{where}: unknown '{key}'.{did_you_mean(key, known)} Known: {', '.join(sorted(known))}")


def check_files(config: ExperimentConfig) -> None:
    """Raises UserError for the first file or folder that is named and not there; before anything is started."""
    if not Path(config.foundation).is_dir() and not looks_like_hub(config.foundation):
        raise UserError(f"foundation {config.foundation}: no such run{near_file(config.foundation)}")
    from rlhf.data.sources import is_path, split_event

    for source in (*config.pairs.get("data", []), *config.pairs.get("prompts", []), *config.prompts,
                   *(file for texts in config.perplexity.values() for file in texts)):  # fmt: skip
        if is_path(source) and not Path(split_event(source)[0]).expanduser().is_file():
            raise UserError(f"{source}: no such file{near_file(source)}")
    parts = [config.reward, config.train_referee, *(config.methods[name] for name in config.trained)]
    files = [part["config"] for part in parts if part.get("config")]
    files += [config.pairs[k] for k in ("sample", "annotate") if k in config.pairs]
    for file in files:
        if not Path(file).is_file():
            raise UserError(f"{file}: no such file{near_file(file)}")


def looks_like_hub(name: str) -> bool:
    """owner/model, and no folder of that owner here."""
    return name.count("/") == 1 and not Path(name).parent.is_dir()


def as_number(value: Any) -> int | float | None:
    """A finite number, also where YAML reads '1e-5' as a text; None for anything else."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    if isinstance(value, bool) or not math.isfinite(number):
        return None
    return number if isinstance(value, str) else value

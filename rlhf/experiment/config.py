"""The options of an experiment: methods, their swept values, seeds, budget, and how every policy is
measured.
"""

import os
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    AliasChoices,
    BeforeValidator,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from rlhf.config import SEED, option
from rlhf.errors import UserError
from rlhf.jobs.job import BEST_OF_N
from rlhf.validation import Count, Number, Spec, validate

# sets how long a program trains
LENGTH_OPTION = {"dpo": "max_steps", "ppo": "total_episodes"}
DECIDE_LENGTH = ("max_steps", "total_episodes", "rollout_batch_size")

# The experiment sets these for every program: a method with its own would not be compared like for
# like.
SET_FOR_ALL = {
    "model_name_or_path",
    "data",
    "half",
    "seed",
    "temperature",
    "dtype",
    "on_error",
    # what on_error was called before
    "on_bad",
    "output_dir",
    "overwrite_output_dir",
    "resume",
    "save_steps",
    "save_total_limit",
    "validation_fraction",
    "test_fraction",
    "max_prompt_length",
    "max_response_length",
}


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Files = Annotated[list[str], BeforeValidator(_as_list)]


class Pairs(Spec):
    """Where preference pairs come from: given files, or sampled and annotated for each seed."""

    data: Files | None = None
    prompts: Files | None = None
    sample: str | None = None
    annotate: str | None = None

    @model_validator(mode="after")
    def check_source(self) -> Self:
        # pairs are either given or made: half of either cannot run
        made = (self.prompts, self.sample, self.annotate)
        is_wrong = None in made if self.data is None else any(made)
        if is_wrong:
            raise ValueError(
                "expected either data: [FILE], or prompts: [FILE] with sample: CONFIG and annotate: CONFIG (both run "
                "for each seed)"
            )
        return self


class Part(Spec):
    """What a training program gets: a file of options, and options that replace some of them."""

    # a reward model or a referee may start from another model than the methods
    refused: ClassVar[set[str]] = SET_FOR_ALL - {"model_name_or_path"}

    config: str | None = None
    options: dict[str, Any] = Field(default_factory=dict)

    @field_validator("options")
    @classmethod
    def check_options(cls, options: dict[str, Any]) -> dict[str, Any]:
        refused = sorted(cls.refused & set(options))
        if refused:
            raise ValueError(
                f"'{refused[0]}' is set by the experiment, the same for all; see its own options"
            )
        return options


class Method(Part):
    """A method that trains a policy, once for each swept value and seed."""

    refused: ClassVar[set[str]] = SET_FOR_ALL

    program: Literal["dpo", "ppo"]
    # "strength" is its name in files of earlier versions
    sweep: dict[str, list[Count | Number]] = Field(
        validation_alias=AliasChoices("sweep", "strength")
    )
    eval_every: Count | None = Field(None, ge=1)

    @field_validator("sweep", mode="wrap")
    @classmethod
    def check_sweep(cls, given: Any, read: Any) -> dict[str, list[int | float]]:
        try:
            sweep = read(given)
        # told below with what was found, instead of by pydantic for each type it tried
        except ValidationError:
            sweep = {}
        values = next(iter(sweep.values()), [])
        # trials are named by %g, so that is where values have to differ
        names = {f"{value:g}" for value in values}
        if len(sweep) != 1 or not values or len(names) < len(values):
            raise ValueError(
                f"found {given!r}, expected one option with different values: {{beta: [0.1, 0.5]}}"
            )
        # a budget is matched by length, so a swept length would undo it
        if set(sweep) & set(DECIDE_LENGTH):
            raise ValueError(
                f"'{next(iter(sweep))}' is the length of a run, which is the same for all swept values"
            )
        cls.check_options(sweep)
        return sweep

    @property
    def swept_option(self) -> str:
        return next(iter(self.sweep))

    @property
    def values(self) -> list[int | float]:
        return self.sweep[self.swept_option]


class Sizes(Spec):
    """The swept values of best of n."""

    n: list[Annotated[Count, Field(ge=1)]] = Field(min_length=1)


class BestOfN(Spec):
    """Choose the best of n responses of the initial policy by the reward model; trains nothing."""

    program: ClassVar[None] = None
    options: ClassVar[dict[str, Any]] = {}
    swept_option: ClassVar[str] = "n"

    sweep: Sizes = Field(validation_alias=AliasChoices("sweep", "strength"))

    @property
    def values(self) -> list[int]:
        return self.sweep.n


class Budget(Spec):
    """What each run may spend in all, and by which counter."""

    match: Literal["flops", "tokens_trained", "seconds", "none"] = "none"
    total: Number | None = Field(None, gt=0)
    tolerance: Number = Field(0.1, gt=0)

    @model_validator(mode="after")
    def check_total(self) -> Self:
        if self.match != "none" and self.total is None:
            raise ValueError("'total' is missing, expected a number above 0")
        return self


@dataclass(kw_only=True)
class ExperimentConfig:
    """Compare methods of alignment from one initial policy: every swept value and seed is a run of
    its own.
    """

    output_dir: str = option(help="the folder of the experiment: runs, measurements and report")
    initial_policy: str = option(
        help="the policy that every method starts from and KL is measured to: an SFT run",
        old_name="foundation",
    )
    pairs: dict = option(
        help="preference pairs: {data: [FILE]}; or {prompts: [FILE], sample: CONFIG, annotate: CONFIG}: sampled from "
        "the initial policy and judged by the sandbox's annotators, for each seed"
    )
    prompts: list[str] = option(
        help="files, stores or Hub names with prompts; policies are measured on the test split"
    )
    methods: dict[str, dict] = option(
        help="name: {program: dpo|ppo, config: FILE, sweep: {OPTION: [values]}, options: {...}, eval_every: steps}; "
        "best_of_n: {sweep: {n: [...]}}. The initial policy is always measured"
    )
    seeds: list[int] = option(
        [0, 1, 2], "run seeds: pairs (where sampled), reward model and methods", **SEED
    )
    reward: dict = option(
        {}, "how the reward model of each seed is trained: {config: FILE, options: {...}}"
    )
    budget: dict = option(
        {"match": "none"},
        "match: flops, tokens_trained, seconds or none; total: what each run may spend in all, pairs and reward model "
        "counted in full; tolerance: 0.1. The lengths of the runs follow",
    )
    checkpoints: int = option(
        4, "how often each run is measured, its end counted, where eval_every is not set", low=1
    )

    gold: list[dict] = option(
        [], "the true reward where it is known, e.g. [{voice: configs/voices/shop.yaml}]"
    )
    referee: list[dict] = option(
        [], "a reward model that no method has seen, e.g. [{model: runs/referee}]; decides"
    )
    train_referee: dict = option(
        {},
        "train the referee here, on the half of the groups that no method sees: {config: FILE, options: {...}}",
    )
    others: list[dict] = option([], "further scorers to show")
    judge: dict = option(
        {},
        "a judge of pairs, asked in both orders: {function: module:function}, {http: URL} or "
        "{openai: URL, model: NAME}",
    )
    perplexity: dict[str, list[str]] = option(
        {},
        "held-out texts by name, e.g. {sft: [FILE], stories: [FILE]}: what the policy has forgotten",
    )
    n_prompts: int | None = option(
        None, "number of test prompts, chosen by the hash of their group; default: all", low=2
    )
    samples_per_prompt: int = option(2, "responses of each policy to each prompt", low=1)
    temperature: float = option(1.0, "of sampling, in training and measuring", above=0)
    max_prompt_length: int = option(512, "tokens; longer prompts are dropped and counted", low=1)
    max_response_length: int = option(512, "tokens with EOS", low=1)
    dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto",
        "dtype of the base in sampling, training and measuring; auto: as each config says, by default "
        "bfloat16 on a GPU and float32 elsewhere",
    )
    batch_size: int = option(64, "responses generated together when measuring", low=1)
    validation_fraction: float = option(
        0.05, "share of groups held out for evaluation in training", low=0, high=1
    )
    test_fraction: float = option(
        0.1, "share of groups that only the measuring reads", low=0, high=1
    )
    on_error: Literal["stop", "skip"] = option(
        "stop", "what to do with rows that cannot be used", old_name="on_bad"
    )

    processes: int = option(1, "runs at a time; each is a process of its own", low=1, resume="free")
    launcher: str = option(
        "deepspeed --num_accelerators 1",
        "how a program is started; 'python' for none",
        resume="free",
    )
    redo: bool = option(
        False, "move results of other options to aside/ and make new ones", resume="free"
    )
    report_to: Literal["none", "wandb"] = option(
        "none",
        "wandb: the report as tables, offline without a key",
        resume="free",
    )
    project: str | None = option(
        None, "W&B project; default: WANDB_PROJECT, else rlhf", resume="free"
    )

    def validate(self) -> None:
        # 'runs/x/' and 'runs/x' are the same folder, and one experiment
        self.output_dir = os.path.normpath(self.output_dir)
        self.pairs = _normalised(Pairs, self.pairs, "pairs")
        self.budget = _normalised(Budget, self.budget, "budget")
        for name in ("reward", "train_referee"):
            validate(Part, getattr(self, name), name)
        # as they are saved: what was not given is left out
        self.methods = {
            name: spec.model_dump(exclude_unset=True) for name, spec in self.method_specs.items()
        }
        self._check_seeds()
        self._check_scores()
        self._check_lengths()
        if not self.launcher.strip():
            raise UserError(
                "'launcher' is empty, expected 'deepspeed --num_accelerators 1', or 'python' for none"
            )

    def _check_seeds(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise UserError(f"'seeds' is {self.seeds}, expected different whole numbers from 0 on")
        # 'seeds: 5' is read as the list [5]
        if len(self.seeds) == 1 and self.seeds[0] > 1:
            raise UserError(
                f"'seeds' is the one seed {self.seeds[0]}: for as many seeds write [0, 1, ..., {self.seeds[0] - 1}]; a "
                "single one is 0 or 1"
            )

    def _check_scores(self) -> None:
        """Raise UserError unless one score decides, and each method has what it learns from."""
        # one score decides: with two, the reader could pick the one that says more
        if self.gold and (self.referee or self.train_referee):
            raise UserError(
                "'gold' and a referee are both given: where the true reward is known, no referee is needed"
            )
        if self.referee and self.train_referee:
            raise UserError(
                "'referee' names a referee and 'train_referee' trains one: give one of them"
            )
        if self.judge and len({"function", "http", "openai"} & set(self.judge)) != 1:
            raise UserError(
                f"'judge' is {self.judge}, expected {{function: module:function}}, {{http: URL}} or "
                "{openai: URL, model: NAME}"
            )
        # a reward model is trained for each seed: every method has one to learn from
        if self.reward:
            return
        for name, spec in self.method_specs.items():
            if spec.program == "ppo" and "reward" not in spec.options:
                raise UserError(
                    f"methods: '{name}' needs a reward: give 'reward: {{config: configs/reward.yaml}}', or its own "
                    "options: {reward: [...]}"
                )
            # best of n has no options of its own that could name a scorer
            if name == BEST_OF_N:
                raise UserError(
                    f"methods: '{name}' chooses by the reward model; give 'reward: {{config: FILE}}'"
                )

    def _check_lengths(self) -> None:
        """Raise UserError unless something is trained and matched methods have equal chances.

        A method with more tuning trials finds a better swept value by luck.
        """
        trials = {name: len(self.method_specs[name].values) for name in self.trained}
        if not trials:
            raise UserError(
                "'methods' trains nothing; for example dpo: {program: dpo, config: FILE, sweep: {beta: [...]}}"
            )
        # lengths are as given, and nothing has to be equal
        if not self.matched:
            return
        if len(set(trials.values())) > 1:
            counts = ", ".join(f"{name} {count}" for name, count in trials.items())
            raise UserError(
                f"'methods' gives unequal numbers of swept values ({counts}): matched methods get equal numbers of "
                "tuning trials. Give as many, or budget: {match: none}"
            )
        for name in self.trained:
            spec = self.method_specs[name]
            length = LENGTH_OPTION[spec.program]
            if length in spec.options:
                raise UserError(
                    f"methods: '{name}' sets '{length}', which follows from the matched budget; leave it out"
                )

    @cached_property
    def method_specs(self) -> dict[str, Method | BestOfN]:
        """The methods as typed records, by name. Raises UserError for a method that is not
        described as expected.
        """
        specs: dict[str, Method | BestOfN] = {}
        for name, method in self.methods.items():
            where = f"methods: '{name}'"
            # the name becomes a folder, a column and a legend
            if not name.replace("_", "").isalnum() or name == "sft":
                raise UserError(
                    f"{where}: a name has letters, digits and '_' alone, and 'sft' is that of the initial policy"
                )
            specs[name] = validate(BestOfN if name == BEST_OF_N else Method, method, where)
        return specs

    @property
    def trained(self) -> list[str]:
        """The methods that train a policy."""
        return [name for name in self.method_specs if name != BEST_OF_N]

    @property
    def matched(self) -> str | None:
        """The counter that is equal for all runs, or None."""
        return None if self.budget["match"] == "none" else self.budget["match"]

    @property
    def best_of_n_sizes(self) -> list[int]:
        """The swept values of best of n; empty where it is not compared."""
        return self.method_specs[BEST_OF_N].values if BEST_OF_N in self.method_specs else []

    @property
    def pool(self) -> int:
        """Return how many responses the initial policy gives to each prompt.

        These are the ones it is measured by, and beside them enough for the largest n of best_of_n,
        which must not choose among the responses it is compared with.
        """
        return self.samples_per_prompt * (1 + max(self.best_of_n_sizes, default=0))

    def learnt_scorers(self) -> list[dict[str, Any]]:
        """Return the scorers that methods name in their own options."""
        scorers = []
        for spec in self.method_specs.values():
            scorers += spec.options.get("reward") or []
        return scorers


def _normalised(model: type[Spec], value: Any, name: str) -> dict[str, Any]:
    return validate(model, value, name).model_dump(exclude_none=True)

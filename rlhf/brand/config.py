"""The options of `rlhf brand run`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from rlhf.brand.gates import read_gates
from rlhf.config import SEED, option
from rlhf.errors import UserError

# What `train` leaves open. A base hardly ever writes a brand's greeting (e^-24 in one measured case),
# so that a few dozen pairs need several passes, at the rate of an adapter, and the loss of the better
# answer itself: DPO alone is content with moving the worse one down.
DPO_PASSES = {"num_train_epochs": 5, "learning_rate": 3e-4, "warmup_steps": 0.1}
DPO_LOSS = {"loss_type": ["sigmoid", "sft"], "trl": {"loss_weights": [1.0, 0.5]}}


@dataclass(kw_only=True)
class BrandConfig:
    """From a brand voice to an adapter with a ship verdict: prompts, answers, pairs, training, blind
    A/B against the base, gates.
    """

    voice: str = option(help="the brand voice (YAML); rlhf voice check explains it")
    judge: dict = option(
        {},
        "what measures the tone of the voice: {openai: URL, model: NAME}, {http: URL}, {function: ...}",
    )
    model_name_or_path: str = option(
        help="the base: where training starts and what the adapter has to beat"
    )
    output_dir: str = option(help="the folder of all that is made")
    prompts: list[str] = option(
        [], "files or Hub names with prompts; their metadata gives the facts"
    )
    templates: dict = option(
        {},
        "instead: {prompts: ['Where is my {item}?'], values: {item: [kettle, lamp]}}; values are facts too",
    )
    n_prompts: int | None = option(
        None, "prompts to sample answers to, drawn by the seed; default: all", low=1
    )
    samples_per_prompt: int = option(4, "answers sampled to each", low=1)
    temperature: float = option(1.0, "of sampling, in training data and in the A/B", above=0)
    rewrite: bool = option(True, "also rewrite answers by rule, where that raises their score")
    margin: float = option(0.1, "the least difference in score of a pair", above=0, high=1)
    check: Literal["none", "simulated", "people"] = option(
        "none", "who checks pairs before training; people: the run stops until they have judged"
    )
    check_pairs: int = option(100, "pairs that are checked", low=1)
    method: Literal["dpo", "ppo"] = option(
        "dpo", "dpo learns from the pairs; ppo from the voice's score, without pairs"
    )
    train: dict = option(
        {},
        "options of the training program; 'config' is a file of them: {config: configs/dpo.yaml}. DPO has other "
        "defaults here, made for few pairs",
    )
    votes: Literal["simulated", "people"] = option(
        "people", "who compares the adapter with the base on test prompts"
    )
    votes_per_pair: int = option(
        1, "people, or simulated annotators, who judge each", low=1, high=5
    )
    test_prompts: int | None = option(
        None, "test prompts of the A/B, drawn by the seed; default: all", low=1
    )
    texts: list[str] = option([], "exchanges of another kind, whose perplexity is not to rise")
    task: list[str] = option([], "questions with answers, which are to be solved as well as before")
    gates: dict = option(
        {}, "bounds that differ from the defaults, {facts: -0.02}; null turns a gate off"
    )
    refusal_phrases: list[str] = option(
        [], "regular expressions of refusals, beside the English ones"
    )
    export: Literal["none", "merged", "gguf", "ollama", "vllm"] = option(
        "none", "what is written where the verdict is SHIP; none: the command is printed"
    )
    max_prompt_length: int = option(512, "tokens; longer prompts are dropped", low=1)
    max_response_length: int = option(512, "tokens with EOS", low=1)
    batch_size: int = option(64, "responses generated together", low=1)
    dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto", "dtype of the base; auto is bfloat16 on a GPU and float32 elsewhere"
    )
    validation_fraction: float = option(
        0.1, "of the prompts: not trained on, to see what was memorised", low=0, high=1
    )
    test_fraction: float = option(0.2, "of the prompts: for the A/B", low=0, high=1)
    seed: int = option(0, "of prompts, sampling, training and simulated annotators", **SEED)
    launcher: str = option("deepspeed --num_accelerators 1", "what starts the training program")
    redo: bool = option(
        False, "remake what was made with other options; the old results are set aside"
    )

    def validate(self) -> None:
        if bool(self.prompts) == bool(self.templates):
            raise UserError("give either 'prompts' (files) or 'templates'")
        bounds = read_gates(self.gates)
        # a gate without its data would never pass, which is better known before training
        for gate, source in (("perplexity", "texts"), ("task", "task")):
            if getattr(bounds, gate) is not None and not getattr(self, source):
                raise UserError(
                    f"'{source}' is not given, and the gate '{gate}' needs it: name a file, or turn the gate off with "
                    f"gates: {{{gate}: null}}"
                )
        # checks that need no file: they also run where nothing has been made yet
        if self.method == "ppo" and self.check != "none":
            raise UserError("'check' is for pairs, and method ppo has none: check: none")
        if self.method == "dpo" and not self.rewrite and self.samples_per_prompt < 2:
            raise UserError("'samples_per_prompt' is 1, and without 'rewrite' a pair needs two")
        # given twice they could differ, and the report would name the wrong one
        for name in ("model_name_or_path", "output_dir", "data", "reward", "seed"):
            if name in self.train:
                raise UserError(f"'train' has '{name}', which the run itself gives; leave it out")


def dpo_defaults(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of DPO for a brand's few pairs, where `given` leaves them open."""
    found = {name: value for name, value in DPO_PASSES.items() if name not in given}
    # weights without their losses, or losses with other weights, would be a loss nobody asked for
    return found if DPO_LOSS.keys() & given.keys() else found | DPO_LOSS

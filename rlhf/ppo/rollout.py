"""Sample one rollout: prompts -> responses -> scores -> log-probabilities and values, the same on
every rank.
"""

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rlhf.data.records import BadScore, Samples, Scorer, Scores
from rlhf.engines.batched import generate
from rlhf.engines.sampling import Generate, Sampling, sample_key
from rlhf.evaluate import to_samples
from rlhf.model.logprobs import completion_batch
from rlhf.model.packing import group_rows, tokens_per_pass
from rlhf.ppo.advantages import kl_k1, kl_k3
from rlhf.ranks.distributed import DistributedContext
from rlhf.roles.one_base import COLUMNS, EMA_REFERENCE, REWARD, Roles
from rlhf.stats import clustered_se
from rlhf.tensors import masked_mean, masked_sum_rows, pad_right

# what is measured of each token -> the role that gives it
LOGPROBS_OF = {"logprobs": "policy", "ref_logprobs": "reference", "penalty_logprobs": EMA_REFERENCE}
# what a critic on the reward model's trunk reads
OWN_STATES = "own_states"


@dataclass
class Rollout:
    """N responses of the policy with all that was measured of them, whole on every rank.

    Column t of an (N, T) tensor belongs to response token t; entries outside `mask` are 0.
    """

    # what a forward pass reads: ids and attention (N, L), positions, responses and mask (N, T)
    batch: dict[str, Tensor]
    # (N, T) log-probabilities under the policy that sampled, by a pass of the learner or by the
    # engine
    logprobs: Tensor
    # (N, T) the same under the policy that training began with
    ref_logprobs: Tensor
    # (N, T) the same under what the KL penalty pulls to: the moving average of the policy with
    # `reference_ema`, else ref_logprobs again
    penalty_logprobs: Tensor
    # (N, T) value of the state before each token; 0 without a critic
    values: Tensor
    # (N,) as the scorer gave them
    scores: Tensor
    # (N,) whether a response ended with a stop token
    ended: Tensor
    # (N,) the position of a response's prompt among the rollout's prompts
    group_index: Tensor
    # scorer or part -> N numbers, NaN where a part does not apply
    breakdown: dict[str, list[float]]
    samples: Samples
    # duration of each phase, as time/* metrics
    seconds: dict[str, float] = field(default_factory=dict)
    # mean |engine's - learner's| log-probability of a response token; NaN where the engine's stand
    logprob_gap: float = math.nan
    # (n, H) what a critic on the reward model's trunk reads, before each of the n response tokens of
    # this rank's rows alone; None with another critic
    own_states: Tensor | None = None

    @property
    def mask(self) -> Tensor:
        """(N, T), True where the policy sampled the token."""
        return self.batch["mask"]

    def __len__(self) -> int:
        return len(self.scores)


@dataclass(frozen=True)
class RolloutSettings:
    """How much is sampled for each prompt, and in what portions."""

    sampling: Sampling
    seed: int
    samples_per_prompt: int = 1
    # tokens, and rows, in one forward pass of the measurement
    pass_limits: tuple[int, int] = (1024, 512)
    # responses sampled together on one device
    generation_batch_size: int = 64


@dataclass
class RolloutCollector:
    """Samples responses with the policy, scores them and measures them in every role: `collect`.

    Another engine takes the place of `generate`.
    """

    roles: Roles
    scorer: Scorer
    tokenizer: Any
    # tokens that end a response
    stop_ids: list[int]
    world: DistributedContext
    settings: RolloutSettings
    generate: Generate = generate
    # whether the engine's log-probabilities stand for the learner's
    trusts_engine: bool = False

    def collect(self, prompts: list[dict[str, Any]], step: int) -> Rollout:
        """Return the rollout of `step` on these prompts (rows of `encode_prompts`).

        Each rank handles its shard. Parameters have to be whole, because ranks make different
        numbers of passes. BadScore, which a scorer raises on one rank, is raised on all.
        """
        count, seconds = self.settings.samples_per_prompt, {}
        keys = sample_keys(prompts, count, self.settings.seed, step)
        shard = self.world.shard(len(keys))
        own_prompts = [prompts[i // count] for i in shard]

        with timed(seconds, "time/generate"), self.roles.use("policy"):
            completions = self.generate(
                self.roles.model,
                [row["prompt_ids"] for row in own_prompts],
                keys[shard.start : shard.stop],
                self.settings.sampling,
                self.stop_ids,
                self.tokenizer.pad_token_id,
                self.settings.generation_batch_size,
            )
        own_samples = to_samples(own_prompts, completions, self.tokenizer)

        with self.roles.keeping_states():
            with timed(seconds, "time/score"):
                scores = self._score(own_samples)
            columns = {
                name: self.world.gather(column) for name, column in vars(own_samples).items()
            }
            samples = Samples(**columns)
            device, pad_id = self.world.device, self.tokenizer.pad_token_id
            batch = padded_batch(samples.prompt_ids, samples.response_ids, pad_id, device)
            engine_logprobs = pad_right(
                self.world.gather(completions.logprobs),
                width=batch["mask"].shape[1],
                dtype=self.roles.precision,
            ).to(device)
            with timed(seconds, "time/forward"):
                measured = self._measure(batch)

        gap = math.nan
        if "logprobs" in measured:
            gap = float(masked_mean((engine_logprobs - measured["logprobs"]).abs(), batch["mask"]))
        else:
            measured["logprobs"] = engine_logprobs
        return Rollout(
            batch=batch,
            **measured,
            scores=torch.tensor(scores.total, dtype=measured["logprobs"].dtype, device=device),
            ended=torch.tensor(samples.ended, device=device),
            group_index=torch.arange(len(keys), device=device) // count,
            breakdown=scores.breakdown,
            samples=samples,
            seconds=seconds,
            logprob_gap=gap,
        )

    def _score(self, own_samples: Samples) -> Scores:
        """Return the scores of all ranks' samples, each rank scoring its own."""

        def score() -> Scores | None:
            return check_totals(self.scorer(own_samples), own_samples) if len(own_samples) else None

        scores = self.world.raise_on_all_ranks(score)
        totals = self.world.gather(list(scores.total) if scores else [])
        breakdowns = self.world.gather([scores.breakdown] if scores else [])

        # a rank without samples has no breakdown; all others have the same parts
        breakdown: dict[str, list[float]] = {}
        for part in breakdowns:
            for name, values in part.items():
                breakdown.setdefault(name, []).extend(values)
        return Scores(totals, breakdown)

    def _measure(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the (N, T) columns of `Rollout` that a pass gives, each rank measuring its shard of
        the rows (see `measure`), and this rank's own_states.
        """
        names = measured_names(self.roles, self.trusts_engine)
        shard = self.world.shard(len(batch["mask"]))
        own = {name: column[shard.start : shard.stop] for name, column in batch.items()}
        settings = self.settings
        found = measure(self.roles, own, names, settings.pass_limits, settings.sampling.temperature)
        # hidden states are large and stay on this rank, which alone reads them
        measured = {OWN_STATES: found.pop(OWN_STATES, None)}
        for name, part in found.items():
            measured[name] = torch.cat(self.world.gather([part.cpu()])).to(self.world.device)

        measured.setdefault("penalty_logprobs", measured["ref_logprobs"])
        measured.setdefault("values", torch.zeros_like(measured["ref_logprobs"]))
        return measured


def measured_names(roles: Roles, trusts_engine: bool) -> list[str]:
    """Return which columns of a rollout passes have to give; the engine may have given logprobs."""
    names = ["ref_logprobs"]
    # a critic on the policy's trunk needs that pass anyway
    if not trusts_engine or (roles.has_critic and roles.critic_trunk == "policy"):
        names.append("logprobs")
    if roles.has_ema_reference:
        names.append("penalty_logprobs")
    if roles.has_critic:
        names.append("values")
        if roles.critic_trunk == "reward":
            names.append(OWN_STATES)
    return names


@torch.no_grad()
def measure(
    roles: Roles,
    batch: dict[str, Tensor],
    names: list[str],
    pass_limits: tuple[int, int],
    temperature: float,
) -> dict[str, Tensor]:
    """Return the named columns for the B rows of a batch, by passes of rows of similar length.

    logprobs, ref_logprobs, penalty_logprobs and values are (B, T), 0 outside the mask; own_states
    (n, H) for the n response tokens, row after row.
    """
    mask = batch["mask"]
    dtype = roles.precision
    found = {name: torch.zeros(mask.shape, dtype=dtype, device=mask.device) for name in names}
    if OWN_STATES in found:
        found[OWN_STATES] = mask.new_zeros(int(mask.sum()), roles.width, dtype=dtype)
        ends = mask.sum(-1).cumsum(-1).tolist()

    lengths = batch["attention"].sum(-1).tolist()
    for group in group_rows(lengths, *pass_limits):
        rows = torch.tensor(group, device=mask.device)
        part = {name: column[rows] for name, column in batch.items()}
        numbers = measure_part(roles, part, names, temperature)
        if OWN_STATES in numbers:
            of_rows = numbers.pop(OWN_STATES).to(dtype).split(part["mask"].sum(-1).tolist())
            for row, states in zip(group, of_rows, strict=True):
                found[OWN_STATES][ends[row] - len(states) : ends[row]] = states
        for name, column in numbers.items():
            found[name][rows] = column.to(dtype)
    return found


def measure_part(
    roles: Roles, part: dict[str, Tensor], names: list[str], temperature: float
) -> dict[str, Tensor]:
    """Return the named columns for rows that go through a pass together, one pass a role."""
    found = {}
    for name, role in LOGPROBS_OF.items():
        if name in names:
            with roles.use(role):
                found[name] = roles.logprobs(part, temperature)[0]
    if OWN_STATES in names:
        states = found[OWN_STATES] = roles.kept_states(part)
        found["values"] = roles.values_of(states, part["mask"])
    elif "values" in names:
        with roles.use_critic():
            found["values"] = roles.values(part)
    return found


def describe_rollout(rollout: Rollout) -> dict[str, float]:
    """Return the metrics of a rollout that do not depend on how PPO shapes its scores."""
    mask, count = rollout.mask, len(rollout)
    kl = kl_k1(rollout.logprobs, rollout.ref_logprobs)
    sequence_kl = masked_sum_rows(kl, mask)
    lengths = mask.sum(-1).double()
    repetitions = [repetition(ids) for ids in rollout.samples.response_ids]
    metrics = {
        "kl/sequence": sequence_kl.mean(),
        "kl/token": masked_mean(kl, mask),
        "kl/k3": masked_sum_rows(kl_k3(rollout.logprobs, rollout.ref_logprobs), mask).mean(),
        "score/raw": rollout.scores.mean(),
        "response/length": lengths.mean(),
        "response/ended": rollout.ended.double().mean(),
        "response/repetition": sum(repetitions) / count,
    }

    groups = [metadata["group"] for metadata in rollout.samples.metadata]
    error = clustered_se(sequence_kl.tolist(), groups)
    if error is not None:
        metrics["kl/sequence_se"] = error

    # a correlation needs both to vary
    if count > 1 and lengths.std() > 0 and rollout.scores.std() > 0:
        columns = torch.stack([rollout.scores.double(), lengths])
        metrics["score/length_correlation"] = torch.corrcoef(columns)[0, 1]

    for name, values in rollout.breakdown.items():
        # NaN marks a part that does not apply to that prompt
        applicable = [value for value in values if not math.isnan(value)]
        metrics[f"score/{name}"] = sum(applicable) / len(applicable) if applicable else math.nan
    return {name: float(value) for name, value in metrics.items()}


def repetition(ids: list[int], n: int = 4) -> float:
    """Return the share of n-grams that occurred earlier in the same response (seq-rep-n, Welleck et
    al. 2020).

    Ordinary text often repeats pairs of tokens, but rarely four in a row. With fewer than n tokens
    it is 0.
    """
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def sample_keys(
    prompts: list[dict[str, Any]], samples_per_prompt: int, seed: int, step: int
) -> list[int]:
    """Return one noise key for each response, samples of a prompt together.

    A prompt that comes twice in a rollout gets fresh samples.
    """
    keys: list[int] = []
    sampled: dict[tuple[int, ...], int] = {}
    for row in prompts:
        prompt = tuple(row["prompt_ids"])
        first = sampled.get(prompt, 0)
        sampled[prompt] = first + samples_per_prompt
        for sample in range(first, first + samples_per_prompt):
            keys.append(sample_key(seed, f"rollout/{step}", row["prompt_ids"], sample))
    return keys


def check_totals(scores: Scores, samples: Samples) -> Scores:
    """Return the scores. Raises BadScore, with its prompt, for a total that is not finite in float32."""
    largest = torch.finfo(torch.float32).max
    for i, value in enumerate(scores.total):
        # NaN fails too
        if not abs(value) <= largest:
            prompt = samples.prompts[i][-1]["content"]
            raise BadScore(
                f"the score of a response is {value}: prompt {prompt!r}", "total", i, value
            )
    return scores


def padded_batch(
    prompt_ids: list[list[int]],
    response_ids: list[list[int]],
    pad_id: int,
    device: torch.device,
) -> dict[str, Tensor]:
    """Return what `Roles.logprobs` and `Roles.values` read, by name: see `Rollout.batch`."""
    columns = completion_batch(prompt_ids, response_ids, pad_id, device)
    return dict(zip(COLUMNS, columns, strict=True))


def role_scorer(
    roles: Roles,
    pad_id: int,
    batch_size: int = 32,
    name: str = "reward",
    tokens: int = 0,
    role: str = REWARD,
) -> Scorer:
    """Return a reward role as a scorer; it reads the sampled ids, as the reward model read them in
    training.

    batch_size, tokens: rows and tokens of one pass; 0 tokens are what suits the device.
    """

    @torch.no_grad()
    def score(samples: Samples) -> Scores:
        device = next(roles.parameters()).device
        pairs = list(zip(samples.prompt_ids, samples.response_ids, strict=True))
        lengths = [len(prompt) + len(response) for prompt, response in pairs]
        totals = [0.0] * len(samples)
        for group in group_rows(lengths, tokens or tokens_per_pass(device), batch_size):
            prompts, responses = zip(*(pairs[row] for row in group), strict=True)
            batch = padded_batch(prompts, responses, pad_id, device)
            with roles.use(role):
                found = roles.scores(batch, role)
            for row, score in zip(group, found.tolist(), strict=True):
                totals[row] = score
        return Scores(totals, {name: totals})

    return score


@contextlib.contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Store in `seconds[name]` how long the context was open."""
    began = time.monotonic()
    yield
    seconds[name] = time.monotonic() - began

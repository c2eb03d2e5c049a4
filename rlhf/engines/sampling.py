"""What every engine shares: how to sample, the key of a response, the drawing of a token.

A token is drawn by an exponential race: argmax_i (logit_i / temperature - log E_i) with independent
standard exponentials E_i is a draw from the softmax, since -log E is Gumbel noise (Maddison et al.
2014). E is a pure function of (key, position, token id): a token does not depend on rank, batch or
resume, and policies that are sampled by the same keys share their luck.

The noise of a whole vocabulary is never computed. Token ids lie in blocks of n = BLOCK. The
smallest of n exponentials is an exponential divided by n, at a uniform place; each of the others is
that smallest one plus an exponential of its own (Devroye 1986, chapter V, theorem 2.3 and section
2.3). So a block's smallest E comes first and bounds what its tokens can reach. The rest is computed
for those blocks alone whose bound reaches the best token found: a few out of thousands.

The hash has 64 bits, of which 52 make a uniform number u between 0 and 1, and E = -log u. P(E < x)
is right to 2**-53 / BLOCK, about 3e-18, so that tokens down to a probability of 1e-14 are drawn as
often as the softmax says, to 1 in 1,000 of it; no E is below 3e-18, no Gumbel noise above 40.2.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

# token ids in a block. It is part of the noise: whoever changes it, or anything below that gives a
# token another noise, raises rlhf.options.shared.NOISE_VERSION
BLOCK = 32
# at most so many blocks of a row are computed before all are compared with the best token in them
FIRST_BLOCKS = 8
# so many are computed where all has to be known beforehand, in a CUDA graph. Of 152k ids with logits
# of deviation 3, the flattest case, up to 104 can hold the winner
RECORDED_BLOCKS = 256
# logits that are copied at once: 1 MB of float32, which stays in a CPU's cache, and 256 MB
CPU_PIECE = 1 << 18
CUDA_PIECE = 1 << 26


@dataclass(frozen=True)
class Sampling:
    """How to sample. Training uses temperature alone; top_k and top_p belong to evaluation.
    Temperature 0 is greedy.
    """

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


@dataclass
class Completions:
    """B responses: ids with the stop token where there is one, whether each ended, and the
    log-probabilities (nats, under the distribution that was sampled from) as the engine saw them.
    """

    response_ids: list[list[int]]
    ended: list[bool]
    logprobs: list[list[float]]


# called with the row, the id and the log-probability of a token when it is drawn; the response ends
# with it where the call returns True
EachToken = Callable[[int, int, float], bool | None]


class Generate(Protocol):
    """An engine that samples: rlhf.engines.batched.generate, hf.generate, or a VllmEngine."""

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
        """Sample one response per prompt with the adapter that is active now.

        keys: of the noise of each response, see `sample_key`. stop_ids: tokens that end a response.
        At most `batch_size` rows are computed together. `progress(n)` is called when n more are done.
        """


def sample_key(seed: int, purpose: str, prompt_ids: list[int], sample: int) -> int:
    """The 63-bit key of one response's noise.

    `purpose` keeps apart what must be independent, and holds the step where there is one:
    "collect", "evaluate", "rollout/7". Two policies that are compared share sampling noise by the
    same key.
    """
    name = f"{seed}/{purpose}/{prompt_ids}/{sample}"
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1


def draw(
    logits: Tensor, keys: Tensor, position: int | Tensor, sampling: Sampling
) -> tuple[Tensor, Tensor]:
    """Draw one token for each row of logits (B, V).

    keys: (B,), see `sample_key`. position: how many tokens the response has, an int for all rows or
    (B,). Returns the tokens and their log-probabilities (nats, float32) under the distribution that
    was sampled from, (B,) each.
    """
    logits = logits.float()
    temperature = sampling.temperature
    if temperature == 0:
        tokens = logits.argmax(-1)
        return tokens, _logprobs(logits, tokens, 1.0)
    if sampling.top_k > 0 or sampling.top_p < 1.0:
        logits = restrict(logits / temperature, sampling.top_k, sampling.top_p)
        temperature = 1.0

    noise = TokenNoise(keys, position, logits.shape[-1])
    tokens = _race(logits, temperature, noise)
    return tokens, _logprobs(logits, tokens, temperature)


def draw_recorded(
    logits: Tensor, keys: Tensor, position: Tensor, sampling: Sampling
) -> tuple[Tensor, Tensor]:
    """Draw as `draw` does by temperature alone, without waiting for the device: in a CUDA graph.

    Where a token is not certain to be the one that `draw` gives, which is rare, its log-probability
    is NaN.
    """
    logits = logits.float()
    temperature = sampling.temperature
    if temperature == 0:
        return draw(logits, keys, position, sampling)
    noise = TokenNoise(keys, position, logits.shape[-1])
    tokens, is_certain = _race_among(logits, temperature, noise, RECORDED_BLOCKS)
    logprobs = _logprobs(logits, tokens, temperature)
    return tokens, logprobs.masked_fill(~is_certain, float("nan"))


def restrict(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """-inf outside the top_k largest and outside the smallest set whose probability reaches top_p
    (0 and 1 are off).
    """
    if top_k > 0 and top_k < logits.shape[-1]:
        smallest = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, float("-inf"))
    if top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        outside = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before >= top_p)
        logits = logits.masked_fill(outside, float("-inf"))
    return logits


class TokenNoise:
    """The exponential noise E of one position of B responses, computed block by block.

    `least` (B, blocks) is the smallest E of each block. A block's last ids may be above the
    vocabulary: the noise of a token does not depend on its size.
    """

    def __init__(self, keys: Tensor, position: int | Tensor, vocabulary: int):
        steps = torch.zeros_like(keys) + (position + 1)
        self.states = _mix(keys + steps * _signed(0x9E3779B97F4A7C15))
        self.offsets = torch.arange(BLOCK, device=keys.device)
        blocks = torch.arange(-(-vocabulary // BLOCK), device=keys.device)
        # a row's counter runs up from 0 for its tokens, and down from -1 for its blocks
        bits = self._bits(self.states[:, None], -1 - blocks)
        self.least = _exponential(bits) / BLOCK
        # _exponential leaves out the 12 lowest bits
        self.places = bits & (BLOCK - 1)

    def of_blocks(self, rows: Tensor, blocks: Tensor) -> Tensor:
        """Return E (n, BLOCK), float64, of the tokens of n blocks, given by row and number (n,)."""
        tokens = blocks[:, None] * BLOCK + self.offsets
        above = _exponential(self._bits(self.states[rows][:, None], tokens))
        is_least = self.offsets == self.places[rows, blocks][:, None]
        return above.masked_fill_(is_least, 0.0).add_(self.least[rows, blocks][:, None])

    @staticmethod
    def _bits(states: Tensor, counters: Tensor) -> Tensor:
        return _mix(states + counters * _signed(0xD1342543DE82EF95))


def _race(logits: Tensor, temperature: float, noise: TokenNoise) -> Tensor:
    """Return argmax of logits / temperature - log E over the vocabulary, (B,)."""
    bounds = _bounds(logits, temperature, noise)
    count = min(FIRST_BLOCKS, 1 + bounds.shape[1] // 32)
    first = bounds.topk(count, sorted=False).indices
    reached = _best_tokens(logits, temperature, noise, *_by_row(first))[0]
    reached = reached.view(-1, count).amax(-1, keepdim=True)

    # the margin is for the rounding of a logarithm, 1e-14
    rows, blocks = (bounds >= reached - 1e-9).nonzero(as_tuple=True)
    best = torch.full_like(bounds, float("-inf"))
    tokens = torch.zeros_like(noise.places)
    found = _best_tokens(logits, temperature, noise, rows, blocks)
    best[rows, blocks], tokens[rows, blocks] = found
    return tokens.gather(-1, best.argmax(-1, keepdim=True)).squeeze(-1)


def _race_among(
    logits: Tensor, temperature: float, noise: TokenNoise, count: int
) -> tuple[Tensor, Tensor]:
    """Return the winners among the `count` blocks of the highest bounds, and whether no other block
    can hold a better token, (B,) each: `_race` in a number of operations that is known beforehand.
    """
    bounds = _bounds(logits, temperature, noise)
    count = min(count, bounds.shape[1])
    highest, blocks = bounds.topk(count)
    best, tokens = _best_tokens(logits, temperature, noise, *_by_row(blocks))
    best, place = best.view(-1, count).max(-1, keepdim=True)
    winners = tokens.view(-1, count).gather(-1, place).squeeze(-1)
    if count == bounds.shape[1]:
        return winners, torch.ones_like(winners, dtype=torch.bool)
    return winners, highest[:, -1] < best[:, 0] - 1e-9


def _bounds(logits: Tensor, temperature: float, noise: TokenNoise) -> Tensor:
    """Return what no token of a block can exceed, (B, blocks)."""
    return _block_maxima(logits).double() / temperature - noise.least.log()


def _by_row(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows and blocks, (B * n,) each, of n blocks of each row, (B, n)."""
    rows = torch.arange(len(blocks), device=blocks.device)
    return rows[:, None].expand_as(blocks).flatten(), blocks.flatten()


def _best_tokens(
    logits: Tensor, temperature: float, noise: TokenNoise, rows: Tensor, blocks: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the largest logit / temperature - log E in each of n blocks, and its token, (n,)."""
    tokens = blocks[:, None] * BLOCK + noise.offsets
    found = logits[rows[:, None], tokens.clamp(max=logits.shape[-1] - 1)]
    values = found.double().div_(temperature).sub_(noise.of_blocks(rows, blocks).log_())
    values.masked_fill_(tokens >= logits.shape[-1], float("-inf"))
    best, place = values.max(-1)
    return best, blocks * BLOCK + place


def _block_maxima(logits: Tensor) -> Tensor:
    """Return the largest logit of each block, (B, blocks); the last block may be shorter."""
    whole = logits.shape[-1] // BLOCK * BLOCK
    maxima = logits[:, :whole].unflatten(-1, (-1, BLOCK)).amax(-1)
    if whole < logits.shape[-1]:
        maxima = torch.cat([maxima, logits[:, whole:].amax(-1, keepdim=True)], dim=-1)
    return maxima


def _logprobs(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """Return log softmax(logits / temperature) of one token a row, (B,), without keeping the
    others.
    """
    piece = CUDA_PIECE if logits.is_cuda else CPU_PIECE
    rows = max(1, piece // logits.shape[-1])
    found = []
    for part, chosen in zip(logits.split(rows), tokens[:, None].split(rows), strict=True):
        if temperature != 1.0:
            part = part / temperature
        found.append(part.log_softmax(-1).gather(-1, chosen))
    return torch.cat(found).squeeze(-1)


def _exponential(bits: Tensor) -> Tensor:
    """Return -log u, float64, with u strictly between 0 and 1 from the 52 highest of 64 bits."""
    # the shift keeps the sign: from -2**51 to 2**51 - 1
    uniform = (bits >> 12).double().add_(2.0**51 + 0.5).mul_(2.0**-52)
    return uniform.log_().neg_()


def _mix(x: Tensor) -> Tensor:
    """Apply the finaliser of SplitMix64 (Steele, Lea & Flood 2014) to int64 with wrap-around, in
    place.
    """
    x ^= _shift(x, 30)
    x *= _signed(0xBF58476D1CE4E5B9)
    x ^= _shift(x, 27)
    x *= _signed(0x94D049BB133111EB)
    x ^= _shift(x, 31)
    return x


def _shift(x: Tensor, by: int) -> Tensor:
    # a shift of int64 keeps the sign, this one does not
    return (x >> by).bitwise_and_((1 << (64 - by)) - 1)


def _signed(constant: int) -> int:
    return constant - (1 << 64) if constant >= 1 << 63 else constant

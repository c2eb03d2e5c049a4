"""How tokens are drawn. The noise is held against whole-vocabulary noise written with NumPy, which
has unsigned integers; that against the exponential distribution; the draws against the softmax.
"""

import math

import numpy
import pytest
import torch
from scipy import stats
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf.engines import sampling
from rlhf.engines.sampling import Sampling, TokenNoise, draw, restrict, sample_key
from rlhf.options.shared import NOISE_VERSION

MASK = (1 << 64) - 1


def splitmix(x: numpy.ndarray) -> numpy.ndarray:
    x = (x ^ (x >> numpy.uint64(30))) * numpy.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> numpy.uint64(27))) * numpy.uint64(0x94D049BB133111EB)
    return x ^ (x >> numpy.uint64(31))


def exponential(bits: numpy.ndarray) -> numpy.ndarray:
    # the sign of the 64 bits comes first: -2**63 is the smallest
    ordered = bits ^ numpy.uint64(1 << 63)
    return -numpy.log(((ordered >> numpy.uint64(12)).astype(float) + 0.5) / 2.0**52)


def whole_noise(keys: list[int], position: int, vocabulary: int) -> numpy.ndarray:
    """E of all tokens, (B, V), as the module describes it."""
    blocks = -(-vocabulary // 32)
    step = 0x9E3779B97F4A7C15 * (position + 1)
    states = splitmix(numpy.array([(key + step) & MASK for key in keys], dtype=numpy.uint64))
    gamma = numpy.uint64(0xD1342543DE82EF95)
    tokens = numpy.arange(32 * blocks, dtype=numpy.uint64)
    own = exponential(splitmix(states[:, None] + tokens * gamma)).reshape(-1, blocks, 32)
    below = numpy.arange(1, blocks + 1, dtype=numpy.uint64)
    bits = splitmix(states[:, None] - below * gamma)
    least = exponential(bits)[..., None] / 32
    is_least = numpy.arange(32) == (bits % numpy.uint64(32)).astype(int)[..., None]
    noise = numpy.where(is_least, least, least + own)
    return noise.reshape(len(keys), -1)[:, :vocabulary]


def keys_of(count: int, name: str = "x") -> list[int]:
    return [sample_key(0, name, [1], s) for s in range(count)]


def many(count: int) -> torch.Tensor:
    """Keys from torch's own generator: a hash for each would take seconds."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(2**62, (count,), generator=generator)


def p_value(tokens: torch.Tensor, logits: torch.Tensor) -> float:
    """Pearson's chi-square of tokens against softmax(logits), tokens of fewer than 10 expected draws
    taken together.
    """
    expected = logits.double().softmax(-1) * len(tokens)
    counts = torch.bincount(tokens, minlength=len(expected)).double()
    often = expected >= 10
    expected = torch.cat([expected[often], expected[~often].sum()[None]])
    counts = torch.cat([counts[often], counts[~often].sum()[None]])
    kept = expected >= 10
    statistic = ((counts - expected)[kept] ** 2 / expected[kept]).sum()
    return float(stats.chi2.sf(float(statistic), int(kept.sum()) - 1))


def test_the_noise_of_version_2_stays_what_it_is():
    # worked with Python's integers. Where these numbers change, raise NOISE_VERSION, so that no run
    # goes on with another noise than it began with
    def mix(x):
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
        return x ^ (x >> 31)

    def exponential(bits):
        return -math.log((((bits + 2**63) % 2**64 >> 12) + 0.5) / 2**52)

    # key 12345, position 7, block 2 of tokens 64 to 95: token 84 has the least
    state = mix((12345 + 8 * 0x9E3779B97F4A7C15) & MASK)
    block = mix((state - 3 * 0xD1342543DE82EF95) & MASK)
    least = exponential(block) / 32
    own = exponential(mix((state + 65 * 0xD1342543DE82EF95) & MASK))
    noise = TokenNoise(torch.tensor([12345]), 7, 96).of_blocks(torch.tensor([0]), torch.tensor([2]))
    assert NOISE_VERSION == 2 and block % 32 == 20
    assert noise[0, 20].item() == pytest.approx(least, rel=1e-14)
    assert noise[0, 1].item() == pytest.approx(least + own, rel=1e-14)
    tokens, _ = draw(torch.zeros(6, 1000), torch.arange(6), 0, Sampling())
    assert tokens.tolist() == [702, 690, 680, 886, 519, 409]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("spread", [0.0, 0.1, 1.0, 3.0, 20.0])
@pytest.mark.parametrize("vocabulary", [2, 31, 32, 33, 1000, 32_000])
def test_the_draw_is_the_argmax_over_the_whole_vocabulary(vocabulary, spread, temperature):
    generator = torch.Generator().manual_seed(vocabulary)
    logits = spread * torch.randn(48, vocabulary, generator=generator)
    # some tokens stand out, as in a language model, and some are impossible
    logits += 8 * (torch.rand(logits.shape, generator=generator) < 3 / vocabulary)
    logits[:, 1:][torch.rand(48, vocabulary - 1, generator=generator) < 0.2] = -math.inf
    keys = keys_of(48)
    tokens, logprobs = draw(logits, torch.tensor(keys), 11, Sampling(temperature=temperature))
    values = logits.double().numpy() / temperature - numpy.log(whole_noise(keys, 11, vocabulary))
    assert tokens.tolist() == values.argmax(-1).tolist()
    expected = (logits / temperature).log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)
    torch.testing.assert_close(logprobs, expected, atol=0, rtol=0)


def test_a_token_depends_on_neither_batch_nor_vocabulary_nor_how_much_is_done_at_once(monkeypatch):
    generator = torch.Generator().manual_seed(3)
    logits, keys = torch.randn(40, 5000, generator=generator), torch.tensor(keys_of(40))
    positions = torch.arange(40) % 7
    tokens, logprobs = draw(logits, keys, positions, Sampling())
    for row in range(40):
        alone = draw(logits[row : row + 1], keys[row : row + 1], row % 7, Sampling())
        assert (alone[0].item(), alone[1].item()) == (tokens[row].item(), logprobs[row].item())
    wider = torch.cat([logits, torch.full((40, 333), -math.inf)], dim=-1)
    assert torch.equal(draw(wider, keys, positions, Sampling())[0], tokens)
    for first, piece in ((1, 1), (50, 1 << 30)):
        monkeypatch.setattr(sampling, "FIRST_BLOCKS", first)
        monkeypatch.setattr(sampling, "CPU_PIECE", piece)
        again = draw(logits, keys, positions, Sampling())
        assert torch.equal(again[0], tokens) and torch.equal(again[1], logprobs)


def test_draws_follow_the_softmax():
    # the p-values are fixed by the seed; of 10, one is below 0.001 in 1 % of all seeds
    generator = torch.Generator().manual_seed(5)
    few = torch.tensor([0.5, 1 / 3, 1 / 6]).log()
    words = -1.1 * torch.arange(1.0, 701).log()[torch.randperm(700, generator=generator)]
    n = 30_000
    for logits in (few, torch.zeros(70), words):
        rows = logits.expand(n, -1)
        # keys at random, consecutive keys, and one key at consecutive positions
        for keys, position in (
            (many(n), 0),
            (torch.arange(n), 1000),
            (torch.full((n,), 9), torch.arange(n)),
        ):
            assert p_value(draw(rows, keys, position, Sampling())[0], logits) > 1e-3
    cold = draw(words.expand(n, -1), many(n), 2, Sampling(temperature=0.7))[0]
    assert p_value(cold, words / 0.7) > 1e-3


def test_the_chi_square_sees_a_small_bias(monkeypatch):
    # a token of probability 0.2 that is drawn 8 % more often; then places of the least in a block
    # from 31 instead of 32
    logits = torch.randn(20, generator=torch.Generator().manual_seed(6))
    logits[4] = logits.logsumexp(-1) + math.log(0.25)
    biased = logits.clone()
    biased[4] += 0.1
    tokens = draw(biased.expand(60_000, -1), many(60_000), 0, Sampling())[0]
    assert p_value(tokens, logits) < 1e-6
    assert p_value(tokens, biased) > 1e-3

    init = TokenNoise.__init__

    def without_the_last_place(self, *arguments):
        init(self, *arguments)
        self.places %= 31

    monkeypatch.setattr(TokenNoise, "__init__", without_the_last_place)
    tokens = draw(torch.zeros(60_000, 320), many(60_000), 0, Sampling())[0]
    assert p_value(tokens, torch.zeros(320)) < 1e-4


def test_a_large_vocabulary_follows_the_softmax():
    # 10,000 draws from a vocabulary of 152,000, its tokens in the order of their probability
    logits = -torch.arange(1.0, 151_937).log()
    keys, found = many(10_000), []
    for part in keys.split(100):
        found.append(draw(logits.expand(len(part), -1), part, 3, Sampling())[0])
    tokens = torch.cat(found)
    assert p_value(tokens, logits) > 1e-3
    # and the rare half of the probability in eight parts
    edges = torch.linspace(math.log(400), math.log(151_937), 9).exp().long()
    part_of = torch.bucketize(torch.arange(1, 151_937), edges, right=True)
    parts = torch.zeros(10, dtype=torch.double).index_add(0, part_of, logits.double().softmax(-1))
    assert p_value(part_of[tokens], parts[: part_of.max() + 1].log()) > 1e-3


def test_the_noise_is_exponential_and_independent():
    keys = many(400)
    noise = whole_noise(keys.tolist(), 3, 2000)
    later = whole_noise(keys.tolist(), 4, 2000)
    assert stats.kstest(noise[:, ::7].ravel(), "expon").pvalue > 1e-3
    # Gumbel's moments: mean 0.57722, variance pi^2 / 6
    gumbel = -numpy.log(noise)
    assert abs(gumbel.mean() - 0.57722) < 4 * math.sqrt(1.645 / gumbel.size)
    assert abs(gumbel.var() - math.pi**2 / 6) < 0.02
    # within a block, over its edge, between keys and positions
    pairs = {
        f"tokens {lag} apart": (gumbel[:, :-lag], gumbel[:, lag:]) for lag in (1, 2, 5, 16, 31, 32)
    }
    pairs["keys"] = (gumbel[:-1], gumbel[1:])
    pairs["positions"] = (gumbel, -numpy.log(later))
    for name, (a, b) in pairs.items():
        bound = 4 / math.sqrt(a.size)
        assert abs(numpy.corrcoef(a.ravel(), b.ravel())[0, 1]) < bound, name
        # the small ones, which win, meet as often as chance has it: 0.02 x 0.02
        both = ((a > -math.log(0.0202)) & (b > -math.log(0.0202))).mean()
        expected = (1 - math.exp(-0.0202)) ** 2
        assert abs(both - expected) < 4 * math.sqrt(expected / a.size), name


def test_the_smallest_noise_has_its_full_resolution():
    # 52 bits: u from 2**-53 to 1 - 2**-53, so E from 1.1e-16 to 36.7
    lowest, highest = torch.tensor([-(2**63), 2**63 - 1]), torch.tensor([-1, 0])
    first = sampling._exponential(lowest)
    assert first[0].item() == pytest.approx(53 * math.log(2), rel=1e-12)
    assert first[1].item() == pytest.approx(2.0**-53, rel=1e-12)
    # and in the middle, where the sign changes, no step
    middle = sampling._exponential(highest)
    assert 0 < middle[0].item() - middle[1].item() < 1e-15


def test_two_policies_agree_as_often_as_the_gumbel_coupling_predicts():
    # P(both draw i) = 1 / sum_j max(p_j / p_i, q_j / q_i)
    generator = torch.Generator().manual_seed(8)
    p = torch.randn(200, generator=generator)
    q = p + 0.3 * torch.randn(200, generator=generator)
    ratios_p, ratios_q = (x.softmax(-1)[None] / x.softmax(-1)[:, None] for x in (p, q))
    predicted = float((1 / torch.maximum(ratios_p, ratios_q).sum(-1)).sum())
    assert 0.75 < predicted < 0.85
    keys = many(40_000)
    first, second = (draw(x.expand(40_000, -1), keys, 0, Sampling())[0] for x in (p, q))
    agreed = (first == second).double().mean().item()
    assert abs(agreed - predicted) < 4 * math.sqrt(predicted * (1 - predicted) / 40_000)


class _Sizes(TorchDispatchMode):
    """The bytes of the largest tensor that is made; views of `known` ones are not."""

    def __init__(self, known: torch.Tensor):
        super().__init__()
        self.storage = known.untyped_storage().data_ptr()
        self.largest = 0

    def is_view(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() == self.storage

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and not self.is_view(tensor):
                self.largest = max(self.largest, tensor.numel() * tensor.element_size())
        return result


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7}, {"temperature": 0}])
def test_nothing_as_large_as_the_logits_is_made(options):
    logits, keys = torch.randn(8, 151_936), torch.tensor(keys_of(8))
    with _Sizes(logits) as sizes:
        draw(logits, keys, 0, Sampling(**options))
    assert 0 < sizes.largest <= logits.numel() * 4 / 6


def test_logits_that_are_no_numbers_give_a_token_and_say_so():
    logits = torch.zeros(2, 40)
    logits[0, 7] = math.nan
    tokens, logprobs = draw(logits, torch.tensor([1, 2]), 0, Sampling())
    assert 0 <= tokens[0] < 40 and logprobs[0].isnan() and not logprobs[1].isnan()


@pytest.mark.gpu
@pytest.mark.parametrize("vocabulary", [320, 151_936])
def test_a_gpu_draws_the_same_tokens(vocabulary):
    logits, keys = torch.randn(64, vocabulary), torch.tensor(keys_of(64))
    tokens, logprobs = draw(logits, keys, 5, Sampling())
    there, found = draw(logits.cuda(), keys.cuda(), 5, Sampling())
    assert torch.equal(there.cpu(), tokens)
    torch.testing.assert_close(found.cpu(), logprobs, atol=1e-5, rtol=0)


class _NothingWaits(TorchDispatchMode):
    """Refuses operations that wait for a GPU, which a CUDA graph cannot hold."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "lift_fresh"), name
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("deviation", [0.01, 3.0])
def test_what_a_graph_draws_is_the_same_wherever_it_is_certain(monkeypatch, deviation, temperature):
    generator = torch.Generator().manual_seed(3)
    logits = deviation * torch.randn(64, 4001, generator=generator)
    keys, position = torch.tensor(keys_of(64)), torch.arange(64)
    given = (logits, keys, position, Sampling(temperature=temperature))
    expected, logprobs = draw(*given)
    with _NothingWaits():
        tokens, found = sampling.draw_recorded(*given)
    assert torch.equal(tokens, expected) and torch.equal(found, logprobs)

    # among too few blocks some are not certain, and all that are certain are right
    monkeypatch.setattr(sampling, "RECORDED_BLOCKS", 4)
    tokens, found = sampling.draw_recorded(*given)
    is_certain = ~found.isnan()
    assert torch.equal(tokens[is_certain], expected[is_certain])
    if temperature and deviation > 1:
        assert 0 < is_certain.sum() < 64 and not torch.equal(tokens, expected)
    else:
        assert is_certain.sum() > 60


def test_top_k_and_top_p():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    assert torch.isfinite(restrict(logits, 2, 1.0)).tolist() == [[True, True, False, False]]
    # top_p 0.6: 0.5 does not reach it, 0.8 does
    assert torch.isfinite(restrict(logits, 0, 0.6)).tolist() == [[True, True, False, False]]
    assert torch.isfinite(restrict(logits, 0, 0.5)).tolist() == [[True, False, False, False]]


def test_draws_under_top_k_follow_the_softmax_of_what_is_left():
    # two tokens are left: 0.5 and 0.3 at temperature 0.5 are 25 / 34 and 9 / 34
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    rows = logits.expand(20_000, -1)
    tokens, logprobs = draw(rows, many(20_000), 0, Sampling(temperature=0.5, top_k=2))
    assert p_value(tokens, torch.tensor([25 / 34, 9 / 34, 0.0, 0.0]).log()) > 1e-3
    assert logprobs[tokens == 1][0].item() == pytest.approx(math.log(9 / 34), abs=1e-6)


def test_keys_differ_by_seed_purpose_prompt_and_sample():
    keys = {
        sample_key(seed, purpose, prompt, sample)
        for seed in (0, 1)
        for purpose in ("collect", "evaluate", "rollout/0", "rollout/1")
        for prompt in ([5, 6], [56])
        for sample in (0, 1)
    }
    assert len(keys) == 2 * 4 * 2 * 2 and all(0 <= k < 2**63 for k in keys)

"""What only the fast engine does: fold adapters, share prompts, refill slots, fall back."""

import gc
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer

from rlhf.engines import batched, hf, merged
from rlhf.engines.batched import generate, slots_are_exact
from rlhf.engines.sampling import Sampling, draw
from rlhf.engines.slots import Slots, call_hooks, hooked_passes
from rlhf.runs.budget import Budget
from tests.engines.test_contract import KEYS, PROMPTS, STOPS, adapted, assert_same, sample
from tests.kinds import build


def test_weights_are_folded_by_hand():
    # q: W + (alpha / r) B A = W + 2 B A
    model = adapted(lora_alpha=8)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    expected = layer.base_layer.weight + 2 * (
        layer.lora_B["policy"].weight @ layer.lora_A["policy"].weight
    )
    twin, reason = merged.merged(model)
    assert reason == "" and not any(isinstance(m, LoraLayer) for m in twin.modules())
    own = twin.model.layers[0].self_attn.q_proj.weight
    torch.testing.assert_close(own, expected, atol=1e-6, rtol=0)

    # all else is shared
    base = model.get_base_model().model
    assert twin.model.embed_tokens.weight is base.embed_tokens.weight
    assert twin.model.layers[0].mlp.up_proj.weight is base.layers[0].mlp.up_proj.weight
    assert own is not layer.base_layer.weight
    with model.disable_adapter():
        bare, _ = merged.merged(model)
    assert bare.model.layers[0].self_attn.q_proj.weight is layer.base_layer.weight


def test_what_cannot_be_folded_samples_beside_the_weights_and_says_so(monkeypatch, capsys):
    def reason_of(config: LoraConfig) -> str:
        return merged.merged(get_peft_model(build("llama")[0], config))[1]

    plain = {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    assert reason_of(LoraConfig(**plain)) == ""
    assert "DoRA" in reason_of(LoraConfig(**plain, use_dora=True))
    embeddings = plain | {"target_modules": ["embed_tokens"]}
    assert "Embedding" in reason_of(LoraConfig(**embeddings))

    # 3 bytes, half of what is free, hold no copy
    monkeypatch.setattr(merged, "free_memory", lambda device: 6.0)
    model = adapted()
    for _ in range(2):
        assert_same(sample(generate, model), sample(hf.generate, model))
    said = capsys.readouterr().err
    assert said.count("a copy of the adapted weights") == 1


@pytest.mark.parametrize(
    ("kind", "exact"),
    [
        ("llama", True),
        ("gpt2", True),
        ("deepseek_v3", True),
        ("mixtral", True),
        ("opt", True),
        ("mpt", True),
        # windows, positions by distance, recurrent states
        ("mistral", False),
        ("gemma2", False),
        ("bloom", False),
        ("qwen3_next", False),
        ("recurrent_gemma", False),
    ],
)
def test_slots_are_used_where_they_are_exact(kind, exact, capsys):
    model, _ = build(kind)
    assert slots_are_exact(model) == exact
    assert ("in plain batches" in capsys.readouterr().err) == (not exact)


def passes_of(model, prompts, batch_size, sampling=None) -> list[tuple[int, int]]:
    """Return the shapes (rows, tokens) of the passes that sampling makes."""
    slots_are_exact(model)
    shapes = []
    hook = model.model.register_forward_hook(
        lambda module, args, kwargs, output: shapes.append(tuple(kwargs["input_ids"].shape)),
        with_kwargs=True,
    )
    sampling = sampling or Sampling(max_new_tokens=4)
    keys = list(range(1, len(prompts) + 1))
    generate(model, prompts, keys, sampling, STOPS, 0, batch_size)
    hook.remove()
    return shapes


def test_samples_of_one_prompt_share_the_pass_over_it():
    # three samples of a prompt of 8 and two of one of 4, in 5 slots and in 2
    prompts = [list(range(10, 18))] * 3 + [list(range(20, 24))] * 2
    for batch_size in (5, 2):
        passes = passes_of(build("llama")[0], prompts, batch_size)
        # the last token of a prompt belongs to the first step: 7 and 3 are left
        tokens = sum(rows * tokens for rows, tokens in passes if tokens > 1)
        assert tokens in (2 * 7, 7 + 3)


def test_no_pass_computes_rows_that_have_ended():
    model, _ = build("llama")
    prompts = [[n, n + 1, n + 2] for n in range(5, 11)]
    done = generate(model, prompts, KEYS, Sampling(max_new_tokens=10), STOPS, 0, 3)
    steps = [rows for rows, tokens in passes_of(model, prompts, 3, Sampling(10)) if tokens == 1]
    # each token of a response is one row of one pass
    assert sum(steps) == sum(map(len, done.response_ids)) and max(steps) == 3


def test_the_memory_of_a_call_ends_with_it(monkeypatch):
    made = []

    class Noted(Slots):
        def __init__(self, *args):
            super().__init__(*args)
            made.extend([weakref.ref(self), weakref.ref(self.model)])

    model = adapted()
    sample(generate, model)
    monkeypatch.setattr(batched, "Slots", Noted)
    # keys, values and folded weights would wait for the collector of circles while learning goes on
    gc.disable()
    try:
        sample(generate, model)
        assert len(made) == 2 and [reference() for reference in made] == [None, None]
    finally:
        gc.enable()


@pytest.mark.parametrize(
    "more",
    [{"trainable_token_indices": [3, 9]}, {"modules_to_save": ["lm_head"]}],
)
@pytest.mark.parametrize("tied", [True, False])
def test_what_an_adapter_holds_beside_lora_is_in_the_copy(more, tied):
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **more)
    causal = build("llama", tie_word_embeddings=tied)[0]
    plain = sample(hf.generate, causal).response_ids
    model = get_peft_model(causal, config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "delta" in name or "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    twin, reason = merged.merged(model)
    assert reason == "" and not any("peft" in type(m).__module__ for m in twin.modules())
    changed = sample(hf.generate, model)
    assert changed.response_ids != plain
    assert_same(sample(generate, model), changed)
    with model.disable_adapter():
        assert sample(generate, model).response_ids == plain


def test_no_slots_beyond_a_window(capsys):
    model, _ = build("mistral", sliding_window=18)
    for new_tokens in (10, 11):
        # the longest prompt has 8 tokens, and 8 + 10 = 18
        limit = Sampling(max_new_tokens=new_tokens)
        assert_same(
            sample(generate, model, sampling=limit), sample(hf.generate, model, sampling=limit)
        )
        assert ("window of 18" in capsys.readouterr().err) == (new_tokens == 11)


@pytest.fixture()
def short_recordings(monkeypatch):
    """Recorded passes over 8 positions, 16, or all."""
    monkeypatch.setattr("rlhf.engines.slots.SHORTEST_RECORDED", 8)


@pytest.mark.parametrize("blocks", [256, 1])
def test_what_a_graph_replays_gives_the_same(monkeypatch, short_recordings, blocks):
    """Every slot, also those whose rows have ended, more positions than are filled, and a drawing
    that is not certain of all tokens where it looks at one block of ten.
    """
    widths = set()

    class Recorded:
        def __init__(self, slots, width):
            self.slots, self.width = slots, width
            widths.add(width)

        def replay(self):
            self.logits = self.slots.plain_pass(self.slots.places.slots, self.width)
            self.drawn = self.slots.draw(self.logits)

    model = build("llama")[0]
    alike = [[5, 6, 7, n] for n in range(6)]
    # in the last one slots stay behind that have ended at their last position
    cases = [(PROMPTS, STOPS, 6), (PROMPTS, STOPS, 2), (alike, [], 4)]

    def run(prompts, stops, batch_size):
        return generate(model, prompts, KEYS, Sampling(10), stops, 0, batch_size)

    expected = [run(*case) for case in cases]
    monkeypatch.setattr("rlhf.engines.sampling.RECORDED_BLOCKS", blocks)
    monkeypatch.setattr(Slots, "records", True)
    monkeypatch.setattr("rlhf.engines.slots.RecordedPass.of", Recorded)
    drawn = []
    monkeypatch.setattr(batched, "draw", lambda *given: drawn.append(given) or draw(*given))
    for case, done in zip(cases, expected, strict=True):
        assert_same(run(*case), done)
    assert widths == {8, 14, 16}
    # what is not certain is drawn again
    assert bool(drawn) == (blocks == 1)


def test_what_a_graph_repeats_is_counted():
    model = adapted()
    budget = Budget()
    budget.watch(model)
    with torch.no_grad(), budget.counting():
        slots = Slots(merged.merged(model)[0], 3, 16)
        slots.admit(PROMPTS[:2], [0, 1], 64)
        before = budget.flops
        with hooked_passes(slots.model) as passes:
            slots.logits(2, 4)
        one = budget.flops - before
        for made in passes:
            call_hooks(*made)
    assert one > 0 and budget.flops == before + 2 * one


def test_a_recorded_pass_reads_a_power_of_two_or_all_positions():
    slots = Slots(build("llama")[0], 2, 700)
    widths = (1, 256, 257, 512, 513, 700)
    assert [slots.recorded_width(width) for width in widths] == [256, 256, 512, 512, 700, 700]
    assert Slots(build("llama")[0], 2, 100).recorded_width(3) == 100


SAMPLINGS = [Sampling(10), Sampling(10, temperature=0), Sampling(10, top_k=5, top_p=0.8)]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2"])
def test_recorded_steps_on_a_gpu_are_those_of_plain_passes(kind, short_recordings, capsys):
    model = build(kind)[0].cuda()
    for sampling in SAMPLINGS:
        expected = sample(hf.generate, model, sampling=sampling)
        for batch_size in (6, 2):
            found = sample(generate, model, sampling=sampling, batch_size=batch_size)
            assert found.response_ids == expected.response_ids
            for own, other in zip(found.logprobs, expected.logprobs, strict=True):
                assert own == pytest.approx(other, abs=1e-4)
    assert "without CUDA graphs" not in capsys.readouterr().err


@pytest.mark.gpu
def test_recorded_steps_in_bfloat16_are_those_of_plain_passes_but_for_rounding(short_recordings):
    model = adapted().to("cuda", torch.bfloat16)
    for sampling in SAMPLINGS:
        found = sample(generate, model, sampling=sampling)
        expected = sample(hf.generate, model, sampling=sampling)
        # the same keys and shapes give the same responses, to the last bit
        assert vars(sample(generate, model, sampling=sampling)) == vars(found)
        # folded weights round in another way, after which a response may part
        firsts = [
            (own[0], other[0])
            for own, other in zip(found.response_ids, expected.response_ids, strict=True)
        ]
        assert sum(own == other for own, other in firsts) >= len(firsts) - 1
        for row, (own, other) in enumerate(firsts):
            if own == other:
                gap = found.logprobs[row][0] - expected.logprobs[row][0]
                assert abs(gap) < 0.2


@pytest.mark.gpu
def test_graphs_leave_no_memory_behind():
    model = adapted().cuda()
    sample(generate, model)
    held = []
    for _ in range(3):
        sample(generate, model)
        torch.cuda.empty_cache()
        held.append(torch.cuda.memory_reserved())
    assert held[0] == held[1] == held[2]

import json
import math
import pickle
import re
import shutil
import types
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load, load_file, save, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
)

from reward.model import RewardModel, load_reward, write_reward
from rlhf import stages, text
from rlhf.compare.runs import load_policies
from rlhf.data.records import Prompt
from rlhf.errors import UserError
from rlhf.evaluate import eos_probability
from rlhf.model.adapters import check_targets, lora_config, never_trained, token_rows
from rlhf.model.dropout import disable_dropout
from rlhf.model.files import reward_shift
from rlhf.model.loading import (
    InitialModel,
    attention_of,
    check_context,
    context_length,
    load_model,
    trainable_policy,
)
from rlhf.model.logprobs import completion_batch, response_logprobs
from rlhf.model.packing import hidden_width
from rlhf.model.tokenizer import load_tokenizer
from rlhf.model.weights import check_finite
from rlhf.offline import trainers
from rlhf.ranks import distributed
from rlhf.ranks.distributed import DistributedContext, base_dtype, multiplies_bfloat16
from rlhf.roles.one_base import Roles
from tests.conftest import make_tokenizer, random_adapter
from tests.kinds import build


@pytest.fixture
def copy(base_path, tmp_path):
    """A copy of the base whose tensors or config can be changed: copy(names -> names, **config)."""

    def change(rename=lambda tensors: tensors, **config) -> str:
        folder = tmp_path / "model"
        shutil.copytree(base_path, folder)
        tensors = rename(load_file(folder / "model.safetensors"))
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        settings = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(settings | config))
        return str(folder)

    return change


def without(part):
    return lambda tensors: {name: value for name, value in tensors.items() if part not in name}


def prefixed(prefix):
    return lambda tensors: {prefix + name: value for name, value in tensors.items()}


def one_wider(tensors):
    name = "model.layers.1.mlp.up_proj.weight"
    return tensors | {name: torch.zeros(65, 32)}


@pytest.mark.parametrize(
    "rename, config, found",
    [
        (
            prefixed("_orig_mod."),
            {},
            "21 missing .*20 without a place .*_orig_mod.model.embed_tokens.weight",
        ),
        (prefixed("module."), {}, "without a place .*module.model.embed_tokens.weight"),
        (
            without("layers.1.input_layernorm"),
            {},
            r"1 missing \(model.layers.1.input_layernorm.weight\)\. They",
        ),
        (without("nothing"), {"num_hidden_layers": 3}, "9 missing .*model.layers.2"),
        (without("nothing"), {"num_hidden_layers": 1}, "9 without a place .*model.layers.1"),
        (without("nothing"), {"tie_word_embeddings": False}, r"1 missing \(lm_head.weight\)"),
        (
            lambda tensors: tensors | {"score.weight": torch.zeros(1, 32)},
            {},
            r"1 without a place \(score.weight\)",
        ),
        (
            one_wider,
            {},
            r"1 of another shape \(model.layers.1.mlp.up_proj.weight \(65, 32\) for \(64, 32\)\)",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(copy, rename, config, found):
    with pytest.raises(UserError, match=f"do not fit LlamaForCausalLM: .*{found}"):
        load_model(copy(rename, **config))


def test_tensors_that_are_legitimately_absent_or_superfluous_load(copy, base_path):
    def as_older_versions_saved(tensors):
        assert "lm_head.weight" not in tensors  # tied
        tied = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
        return tensors | tied | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}

    assert (
        load_model(copy(as_older_versions_saved)).fingerprint == load_model(base_path).fingerprint
    )


def rope(**scaling):
    return {"rope_parameters": {"rope_theta": 10000.0, **scaling}}


@pytest.mark.parametrize(
    "kind, options, expected",
    [
        ("gpt2", {"n_positions": 48}, 48),  # learned
        ("opt", {"max_position_embeddings": 48}, 48),
        ("mpt", {"max_seq_len": 48}, 48),
        ("llama", {"max_position_embeddings": 48}, 48),  # rotary
        ("mistral", {"max_position_embeddings": 48, "sliding_window": 8}, 48),
        # 4 x 48; the factor of llama3 is in max_position_embeddings
        ("llama", {"max_position_embeddings": 48} | rope(rope_type="linear", factor=4.0), 192),
        ("llama", {"max_position_embeddings": 48} | rope(rope_type="yarn", factor=4.0), 192),
        (
            "llama",
            {"max_position_embeddings": 48}
            | rope(rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0)
            | {"original_max_position_embeddings": 24},
            48,
        ),
        # one kind of rotary positions for each type of layer
        ("gemma3_text", {"max_position_embeddings": 48}, 48),
        ("falcon", {"alibi": True, "max_position_embeddings": 48}, None),
        ("bloom", {}, None),
        ("mamba", {}, None),
    ],
)
def test_context_length(kind, options, expected):
    assert context_length(AutoConfig.for_model(kind, **options)) == expected


def test_lengths_beyond_the_positions_are_refused_with_both_numbers(base_path):
    model = load_model(base_path).model  # 512 positions
    check_context(model, base_path, 400, 112)
    with pytest.raises(
        UserError,
        match=r"max_prompt_length 400 \+ max_response_length 113 = 513 .*positions for 512",
    ):
        check_context(model, base_path, 400, 113)

    config = types.SimpleNamespace(
        model_name_or_path=base_path,
        attn_implementation=None,
        max_prompt_length=512,
        max_response_length=512,
        load_in_4bit=False,
        load_in_8bit=False,
        optim="adamw",
        deepspeed="zero2",
        dtype="auto",
    )
    world = DistributedContext()
    with pytest.raises(UserError, match="1024 tokens"):  # the programs' defaults
        stages.load_initial_model(
            types.SimpleNamespace(program="sft", config=config, torch_dtype="float32", world=world)
        )


def test_a_reward_model_says_that_a_text_is_too_long_for_it(tokenizer):
    reward = RewardModel(
        GPT2LMHeadModel(GPT2Config(vocab_size=320, n_embd=8, n_layer=1, n_head=2, n_positions=9)),
        tokenizer,
    )
    with pytest.raises(UserError, match="10 tokens, but this reward model has positions for 9"):
        reward.score_ids([[5] * 10])


def test_attention_is_transformers_choice_unless_the_run_was_given_one(copy, tmp_path):
    path = copy()
    assert load_model(path).model.config._attn_implementation == "sdpa"
    (tmp_path / "model" / "config.yaml").write_text("attn_implementation: eager\n")
    assert load_model(path).model.config._attn_implementation == "eager"
    assert load_model(path, attn_implementation="sdpa").model.config._attn_implementation == "sdpa"
    assert attention_of(f"{path}/checkpoints/checkpoint-3") == "eager"
    with pytest.raises(
        UserError, match=r"flash_attention_2 cannot be used here .*--attn_implementation sdpa"
    ):
        load_model(path, attn_implementation="flash_attention_2")


def test_an_attention_that_a_run_had_and_this_machine_has_not_is_said(copy, tmp_path, capsys):
    path = copy()
    (tmp_path / "model" / "config.yaml").write_text("attn_implementation: flash_attention_2\n")
    assert load_model(path).model.config._attn_implementation == "sdpa"
    assert "flash_attention_2 cannot be used here" in capsys.readouterr().err


def test_a_model_without_sdpa_loads(tmp_path, tokenizer):
    config = AutoConfig.for_model(
        "gemma2", vocab_size=320, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        head_dim=8, intermediate_size=16,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert load_model(str(tmp_path)).model.config._attn_implementation == "eager"


def test_heads_have_the_width_of_the_last_hidden_state(tmp_path, tokenizer):
    # OPT-350m: hidden_size 32, but the last hidden state is projected to 16
    config = OPTConfig(
        vocab_size=320, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, ffn_dim=32, word_embed_proj_dim=16,
        max_position_embeddings=64, do_layer_norm_before=False,
    )  # fmt: skip
    OPTForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    roles = Roles(load_model(str(tmp_path)), lora_config())
    assert hidden_width(roles.trunk) == roles.heads["value"].in_features == 16
    ids = torch.arange(5, 11).reshape(1, 6)
    batch = {"ids": ids, "attention": torch.ones_like(ids), "positions": torch.tensor([[3, 4]])}
    batch["mask"] = torch.ones(1, 2, dtype=torch.bool)
    with roles.use("value"):
        assert roles.values(batch).shape == (1, 2)


@pytest.mark.parametrize(
    "spare, expected",
    # Pythia has a spare token, GPT-2 has none: EOS fills
    [(["<|padding|>"], "<|padding|>"), ([], "<|im_end|>")],
)
def test_a_tokenizer_without_a_pad_token(tmp_path, spare, expected):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(
        models.WordLevel({"<|im_end|>": 0, "a": 1, **{name: 2 for name in spare}}, unk_token="a")
    )
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<|im_end|>").save_pretrained(
        tmp_path
    )
    assert load_tokenizer(str(tmp_path)).pad_token == expected


def test_padding_is_known_by_the_mask_alone(base_path):
    # the same log-probabilities and the same score whatever fills, a token of the response itself
    # included
    model = load_model(base_path).model
    prompts, responses = [[5, 6, 7], [8, 9]], [[10, 2], [11, 12, 13, 2]]
    with torch.no_grad():
        filled = [completion_batch(prompts, responses, pad) for pad in (0, 2)]
        one, other = (response_logprobs(model, *batch)[0][batch[4]] for batch in filled)
    torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


def test_a_tokenizer_of_vocabulary_and_merges_alone(tmp_path):
    GPT2Config(vocab_size=320, n_embd=8, n_layer=1, n_head=2).save_pretrained(tmp_path)
    make_tokenizer().backend_tokenizer.model.save(str(tmp_path))  # vocab.json and merges.txt
    assert len(load_tokenizer(str(tmp_path))) >= 320


@pytest.mark.parametrize(
    ("kind", "rates"),
    [
        ("llama", {"attention_dropout": 0.3}),
        ("gpt2", {"attn_pdrop": 0.3}),
        ("opt", {"dropout": 0.3}),  # called as a function
        ("opt", {"dropout": 0.0, "layerdrop": 0.5}),  # of whole layers
        ("gpt_bigcode", {"attn_pdrop": 0.3}),
        ("xglm", {"dropout": 0.3}),
        ("falcon", {"hidden_dropout": 0.3}),  # read from the config
        ("mixtral", {"router_jitter_noise": 0.3}),  # on what the router reads
        ("dbrx", {}),
        ("phimoe", {"input_jitter_noise": 0.3}),  # the experts themselves are drawn
    ],
)
def test_a_model_without_dropout_is_the_same_function_in_training(kind, rates):
    model, _ = build(kind, **rates)
    before = model.config.to_dict()
    ids = torch.arange(3, 43).reshape(4, 10)

    def logits():
        return model(input_ids=ids, use_cache=False).logits.detach()

    plain = logits()
    model.train()
    torch.manual_seed(0)
    assert any((logits() - plain).abs().max() > 1e-3 for _ in range(4))  # it does draw
    disable_dropout(model)
    torch.testing.assert_close(model.train() and logits(), plain, atol=1e-5, rtol=0)
    assert model.config.to_dict() == before  # the rates are saved with the weights


def test_a_new_adapter_keeps_the_dropout_it_was_given():
    model = get_peft_model(build("opt", dropout=0.3)[0], lora_config(dropout=0.25))
    model.add_adapter("reference", lora_config(dropout=0.25))
    disable_dropout(model, 0.25)
    rates = {
        name: module.p
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Dropout)
    }
    assert {rate for name, rate in rates.items() if name.endswith("lora_dropout.default")} == {0.25}
    assert {rate for name, rate in rates.items() if not name.endswith("lora_dropout.default")} == {
        0.0
    }
    disable_dropout(model)
    assert all(m.p == 0.0 for m in model.modules() if isinstance(m, torch.nn.Dropout))


def with_nan(tensors):
    tensors["model.norm.weight"][3] = math.nan
    return tensors


def test_a_base_that_holds_nan_is_refused_by_name(copy):
    with pytest.raises(
        UserError, match=r"model: 'model\.norm.weight' holds numbers that are not finite"
    ):
        load_model(copy(with_nan))


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        (
            "model.safetensors",
            b"",
            r"model: no model could be loaded \(Error while deserializing header",
        ),
        ("config.json", b'{"model_type": "lla', "model: no tokenizer could be loaded"),
        ("tokenizer.json", b'{"version"', "tokenizer.json: cannot be read as JSON"),
        (
            "chat_template.jinja",
            b"{{ messages",
            "no chat template could be loaded .unexpected end of template",
        ),
        (
            "chat_template.jinja",
            b"{{ raise_exception('no user role') }}",
            r"loaded \(no user role\)",
        ),
        (
            "chat_template.jinja",
            b"{% for i in range(10**9) %}{% endfor %}",
            "could be loaded .Range too",
        ),
    ],
)
def test_files_of_a_base_that_cannot_be_read_are_one_message(copy, file, content, said):
    folder = copy()
    (Path(folder) / file).write_bytes(content)
    with pytest.raises(UserError, match=said):
        load_model(folder)


def test_code_that_comes_with_a_model_is_neither_run_nor_asked_about(copy, monkeypatch):
    folder = copy(
        model_type="odd", auto_map={"AutoConfig": "odd.Config", "AutoModelForCausalLM": "odd.Model"}
    )
    (Path(folder) / "odd.py").write_text("raise SystemExit('run')")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    with pytest.raises(UserError, match=r"could be loaded .*custom code"):
        load_model(folder)
    (Path(folder) / "model.safetensors").unlink()
    (Path(folder) / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (Path(folder) / "pytorch_model.bin").write_bytes(pickle.dumps(print, protocol=2))
    with pytest.raises(
        UserError, match=r"model: no model could be loaded \(a pickle that holds more than weights"
    ):
        load_model(folder)


def truncated(content: bytes) -> bytes:
    return content[: len(content) // 2]


def with_infinity(content: bytes) -> bytes:
    tensors = load(content)
    tensors[sorted(tensors)[0]].view(-1)[0] = -math.inf
    return save(tensors)


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("adapter_config.json", truncated, "adapter_config.json: cannot be read as JSON"),
        ("rlhf.json", truncated, "rlhf.json: cannot be read as JSON"),
        ("rlhf.json", lambda _: b"[]", "rlhf.json: expected a JSON object, found list"),
        (
            "adapter_model.safetensors",
            truncated,
            "adapter_model.safetensors: the weights cannot be read",
        ),
        ("adapter_model.safetensors", None, "adapter_model.safetensors is not"),
        (
            "adapter_model.safetensors",
            with_infinity,
            "lora_A.weight' holds numbers that are not finite",
        ),
        ("reward.json", truncated, "reward.json: cannot be read as JSON"),
        (
            "reward.json",
            lambda _: b'{"scale": NaN}',
            "reward.json: scale nan and bias 0.0, expected finite",
        ),
        ("reward.json", lambda _: b'{"scale": 0}', "reward.json: scale 0.0 .* other than 0"),
        (
            "reward.json",
            lambda _: b'{"bias": "x"}',
            "reward.json: 'bias': expected a number, found 'x'",
        ),
    ],
)
def test_files_of_an_adapter_that_cannot_be_used_are_one_message_in_every_role(
    base_path, reward_path, tmp_path, file, change, said
):
    folder = tmp_path / "reward"
    shutil.copytree(reward_path, folder)
    content = (folder / file).read_bytes()
    (folder / file).unlink()
    if change is not None:
        (folder / file).write_bytes(change(content))
    with pytest.raises(UserError, match=said):
        load_reward(str(folder))
    with pytest.raises(UserError, match=said):
        Roles(load_model(base_path), lora_config(r=2), str(folder))


def test_bias_and_scale_that_are_not_finite_are_not_saved(tmp_path, reward_path):
    assert reward_shift(reward_path) == (0.5, -0.25)
    with pytest.raises(UserError, match="not saved: bias nan and scale 1"):
        write_reward(tmp_path, math.nan, 1.0)
    assert not list(tmp_path.iterdir())


def test_finite_numbers_pass_and_the_first_odd_tensor_is_named():
    fine = {"a": torch.tensor([1.0, -3e38]), "whole": torch.tensor([2]), "empty": torch.zeros(0)}
    check_finite(fine.items(), "x")
    for bad in (math.nan, math.inf, -math.inf):
        with pytest.raises(UserError, match="x: 'b' holds"):
            check_finite(
                (fine | {"b": torch.tensor([0.0, bad], dtype=torch.bfloat16)}).items(), "x"
            )


def test_each_lora_target_is_a_layer_of_the_model(base_path):
    model = load_model(base_path).model
    for targets in (
        ["all-linear"],
        ["q_proj", "v_proj"],
        ["layers.0.self_attn.q_proj"],
        ["embed_tokens"],
    ):
        check_targets(model, targets)
    with pytest.raises(
        UserError,
        match="Layers of this model: down_proj, embed_tokens, gate_proj, k_proj, o_proj, ",
    ) as e:
        check_targets(model, ["nothing"])
    assert "lm_head" not in str(e.value)  # TRL refuses an adapter on the head
    for targets, said in (
        (["q_proj", "value_proj"], "no layer is called 'value_proj'. Did you mean 'v_proj'"),
        (["q_proj", "mlp"], "no layer is called 'mlp'"),  # a block, which LoRA cannot adapt
        ([".*attn.*proj"], "no layer is called '.*"),
        (["proj"], "no layer is called 'proj'"),
        (["all-linear", "q_proj"], "no layer is called 'all-linear'"),
        ([], "'lora_target_modules' is empty"),
    ):
        with pytest.raises(UserError, match=re.escape(said)):
            check_targets(model, targets)


def stuck_base(base_path, folder, tied=True):
    """The tiny base with the EOS row of its output head equal to the rows of 18 other tokens."""
    model = AutoModelForCausalLM.from_pretrained(base_path)
    if not tied:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    with torch.no_grad():
        model.lm_head.weight[3:21] = model.lm_head.weight[2]
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base_path).save_pretrained(folder)
    return str(folder)


def rows_of_a_new_adapter(path, said, answers=None, resumed=None, **options):
    settings = {
        "use_peft": True,
        "lora_r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "lora_target_modules": ["all-linear"],
    }
    config = types.SimpleNamespace(
        **settings | {"train_eos": "auto", "deepspeed": "zero2"} | options
    )
    run = types.SimpleNamespace(
        config=config, log=said.append, world=DistributedContext(), resumed=resumed
    )
    return stages.new_lora(run, load_model(path), answers=answers).trainable_token_indices


def test_a_row_that_was_never_trained_is_zero_the_mean_or_that_of_ten_others():
    torch.manual_seed(0)
    rows = torch.randn(40, 8)
    assert never_trained(rows, 0) == ""
    rows[1] = 0
    assert never_trained(rows, 1) == "its row is zero"
    # ten others at a hundredth of its norm, then one of them further off
    rows[10:21] = rows[10] * (1 + 0.01 * (torch.arange(11) % 2)[:, None])
    assert never_trained(rows, 10) == "its row is that of 10 others"
    rows[20] *= 1.05
    assert never_trained(rows, 10) == ""
    # a cosine of 0.99 to a cluster of 11 rows, 0.14 of its norm away, as SmolLM2's: trained a little
    aside = torch.linalg.vector_norm(rows[10]) * nn_orthogonal(rows[10]) * 0.14
    rows[20] = rows[10]
    rows[30] = rows[10] + aside
    assert torch.cosine_similarity(rows[30], rows[10], dim=0) > 0.99
    assert never_trained(rows, 30) == "" and never_trained(rows, 10)
    rows = torch.randn(40, 8)
    rows[5] = (rows.sum(0) - rows[5]) / 39
    assert never_trained(rows, 5) == "its row is the mean of all"
    assert never_trained(rows.bfloat16(), 5) == "its row is the mean of all"


def nn_orthogonal(vector):
    """Return a unit vector at a right angle to this one."""
    other = torch.ones_like(vector)
    other -= vector * (other @ vector) / (vector @ vector)
    return other / other.norm()


def test_the_row_of_an_eos_token_that_was_never_trained_is_trained(base_path, tmp_path):
    said = []
    assert rows_of_a_new_adapter(base_path, said) is None and not said
    assert rows_of_a_new_adapter(base_path, said, train_eos="always") == [2]
    stuck = stuck_base(base_path, tmp_path / "tied")
    assert rows_of_a_new_adapter(stuck, said) == [2]
    assert "its row is that of 18 others" in said[-1] and "is trained beside LoRA" in said[-1]
    assert rows_of_a_new_adapter(stuck, said, train_eos="never") is None
    assert (
        rows_of_a_new_adapter(stuck, said, lora_target_modules=["q_proj", "embed_tokens"]) is None
    )
    assert len(said) == 2
    assert rows_of_a_new_adapter(stuck_base(base_path, tmp_path / "two", tied=False), said) == {
        "lm_head": [2]
    }
    start = random_adapter(stuck, tmp_path / "sft", seed=1)
    assert rows_of_a_new_adapter(start, said) is None
    assert said[-1].startswith("warning:") and f"is not trained by the adapter {start}" in said[-1]
    count = len(said)
    learns = random_adapter(stuck, tmp_path / "sft2", seed=1, trainable_token_indices=[2])
    assert rows_of_a_new_adapter(learns, said) is None and len(said) == count


# fmt: off
ANSWERS = [
    {"prompt_ids": [40 + i, 41, 42], "response_ids": [50 + i % 3, 60 + i % 3, 70, 2],
     "record": Prompt(prompt=[{"role": "user", "content": str(i)}])}
    for i in range(12)
]
# fmt: on


@pytest.fixture(scope="module")
def knowing_base(base_path):
    """The tiny base after some training on ANSWERS, whose words and ends it knows."""
    initial = load_model(base_path)
    model = initial.model
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(40):
        ids = torch.tensor([row["prompt_ids"] + row["response_ids"] for row in ANSWERS])
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return initial


@pytest.mark.parametrize(
    ("row", "said_of_it"),
    [
        (None, None),
        # drawn at random, as small as at the start of a training and as long as the others are
        (0.02, "median P(EOS) where 12 given answers end"),
        (0.3, "median P(EOS) where 12 given answers end"),
        ("mean", "its row is the mean of all"),
        ("twin", "median P(EOS) where 12 given answers end"),
    ],
)
def test_the_ends_of_given_answers_show_whether_the_eos_row_was_trained(
    knowing_base, base_path, tmp_path, row, said_of_it
):
    model = deepcopy(knowing_base.model)
    rows = model.lm_head.weight.data
    if row == "mean":
        rows[2] = rows.mean(0)
    elif row == "twin":
        # of one token that is in no text; ten of them would show by themselves
        rows[2] = rows[300]
    elif row:
        rows[2] = row * torch.randn(32, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(base_path).save_pretrained(tmp_path)
    said = []
    found = rows_of_a_new_adapter(str(tmp_path), said, ANSWERS)
    assert found == (None if said_of_it is None else [2])
    assert not said if said_of_it is None else said_of_it in said[-1]


def test_a_base_that_knows_nothing_of_the_answers_is_not_judged_by_them(base_path, tmp_path):
    said = []
    assert rows_of_a_new_adapter(base_path, said, ANSWERS) is None and not said
    # nor one that goes on: its adapter is what it was
    (tmp_path / "adapter_config.json").write_text('{"trainable_token_indices": [2]}')
    resumed = types.SimpleNamespace(folder=tmp_path)
    assert rows_of_a_new_adapter(base_path, said, ANSWERS, resumed) == [2]


@pytest.mark.parametrize(("trained", "tied"), [(False, True), (True, True), (True, False)])
def test_only_with_its_row_trained_can_the_eos_token_be_learnt(base_path, tmp_path, trained, tied):
    initial = load_model(stuck_base(base_path, tmp_path / "base", tied))
    lora = lora_config(r=4)
    lora.trainable_token_indices = token_rows(initial.model, 2) if trained else None
    torch.manual_seed(0)
    model = trainable_policy(initial, lora)
    row = {"prompt_ids": [40, 41, 42], "response_ids": [50, 51, 2]}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(60):
        ids = torch.tensor([row["prompt_ids"] + row["response_ids"]])
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    learnt = eos_probability(model, [row], 0, True, DistributedContext())
    # 19 tokens with one row have one logit: P(EOS) is at most 1/19 = 0.0526 whatever LoRA learns
    assert learnt > 0.5 if trained else learnt < 1 / 19 + 1e-6

    run = types.SimpleNamespace(
        folder=tmp_path / "merged", world=DistributedContext(), program="sft"
    )
    trainers.save_policy(run, model, initial, merge=True)
    merged = load_model(str(tmp_path / "merged")).model
    assert eos_probability(merged, [row], 0, True, DistributedContext()) == pytest.approx(
        learnt, abs=1e-5
    )


@pytest.mark.parametrize(
    ("kind", "left_out"),
    [
        ("phimoe", {"router"}),
        ("llama4_text", {"router"}),
        ("mamba", {"out_proj"}),
        ("falcon", set()),
        ("llama", set()),
    ],
)
def test_all_linear_leaves_out_what_cannot_be_adapted(kind, left_out):
    # routers give more than a tensor; Mamba's kernels read the weight of out_proj and never call it
    initial = InitialModel(build(kind)[0], None, "x", "x", None, "x")
    linear = {
        n.rpartition(".")[2]
        for n, m in initial.model.named_modules()
        if isinstance(m, torch.nn.Linear)
    }
    model = trainable_policy(initial, lora_config(r=2))
    adapted = {
        name.split(".lora_A")[0].rpartition(".")[2]
        for name, _ in model.named_parameters()
        if "lora_A" in name
    }
    assert adapted == linear - left_out - {"lm_head"}
    model(input_ids=torch.arange(3, 9).reshape(1, 6), use_cache=False)


def test_policy_and_reference_are_equal_to_the_last_bit_where_layers_read_transposed_states(
    tmp_path,
):
    # Mamba's x_proj: matmul sums in another order if its weight asks for a gradient, as the
    # policy's alone does
    model, tokenizer = build("jamba")
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    sft = random_adapter(str(tmp_path / "base"), tmp_path / "sft", seed=1)
    roles = Roles(load_model(sft), lora_config())
    batch = completion_batch([[5, 6, 7], [8, 9]], [[10, 11, 12, 2], [13, 14, 2]], 0)
    batch = dict(zip(("ids", "attention", "positions", "responses", "mask"), batch, strict=True))
    with torch.no_grad():
        with roles.use("policy"):
            policy, _ = roles.logprobs(batch)
        with roles.use("reference"):
            reference, _ = roles.logprobs(batch)
    assert torch.equal(policy, reference)
    assert not any(p.requires_grad for n, p in roles.named_parameters() if ".reference." in n)


@pytest.mark.parametrize("multiplies", [False, True])
def test_bfloat16_on_a_cpu_that_does_not_multiply_it_is_called_slow(
    monkeypatch, capsys, multiplies
):
    monkeypatch.setattr(distributed, "multiplies_bfloat16", lambda device: multiplies)
    monkeypatch.setattr(text, "_SAID", set())
    cpu = torch.device("cpu")
    base_dtype("float32", cpu)
    base_dtype("auto", cpu)
    assert capsys.readouterr().err == ""
    assert base_dtype("bfloat16", cpu) == "bfloat16"
    assert ("--dtype float32" in capsys.readouterr().err) == (not multiplies)


def test_a_gpu_multiplies_bfloat16_and_a_cpu_as_onednn_says(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert multiplies_bfloat16(torch.device("cuda")) and multiplies_bfloat16(torch.device("cpu"))
    monkeypatch.undo()
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    # CPUs with AVX-NE-CONVERT and no AVX512 have instructions of another kind
    if "avx2" in flags and "avx_ne_convert" not in flags:
        assert multiplies_bfloat16(torch.device("cpu")) == ("avx512bw" in flags)


def test_what_samples_and_measures_takes_bfloat16_on_a_gpu_unless_told(sft_path):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert base_dtype("auto", cpu) == "float32"
    assert base_dtype("auto", gpu) == "bfloat16"
    assert base_dtype("float32", gpu) == "float32"
    # whole weights learn in float32, unless told otherwise
    assert base_dtype("auto", gpu, trains_whole=True) == "float32"
    assert base_dtype("bfloat16", gpu, trains_whole=True) == "bfloat16"

    ((model, _),) = load_policies([sft_path], cpu, 8, 8, "bfloat16")
    dtypes = {name: weight.dtype for name, weight in model.named_parameters()}
    assert {kind for name, kind in dtypes.items() if "lora_" not in name} == {torch.bfloat16}
    assert {kind for name, kind in dtypes.items() if "lora_" in name} == {torch.float32}

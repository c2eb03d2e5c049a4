"""Forward passes without padding: what stands in a row, and TRL's own numbers with padding."""

import pytest
import torch
from datasets import Dataset
from trl import DPOConfig, RewardConfig, SFTConfig, SFTTrainer

from reward.model import trainable_reward
from reward.trainer import PairCollator, RewardTrainer
from rlhf.errors import UserError
from rlhf.model.adapters import frozen_copy, lora_config
from rlhf.model.loading import InitialModel, trainable_policy
from rlhf.model.packing import PairRows, decoder_and_head, is_right_padded
from rlhf.offline.packed import pays
from rlhf.offline.soft_dpo import EncodedDPOTrainer
from rlhf.offline.trainers import count_training, prepare_trainer
from rlhf.runs.budget import Budget
from tests.kinds import build

# prompt, chosen, rejected: a beginning of the answers in common, an answer within the other, 0 as
# a token, and padding in either half
PAIRS = [
    ([5, 6, 7], [9, 9, 8, 2], [9, 9, 2]),
    ([5], [4, 4, 4, 4, 4, 4, 0, 2], [2]),
    ([8, 8, 6, 5, 7], [11, 2], [11, 2, 7, 2]),
]
# tokens of the trunk: 3 prompts of 3 + 1 + 5, then 4 + 1, 8 + 1 and 2 + 2 of answers
PAIR_TOKENS = 9 + 5 + 9 + 4


def test_what_a_pair_shares_is_there_once():
    ids = torch.tensor([[5, 6, 7, 2], [5, 2, 0, 0], [5, 6, 8, 0], [5, 2, 0, 0]])
    attention = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 0]])
    rows = PairRows.of(ids, attention, paired=True)
    assert rows.ids.tolist() == [[5, 6, 7, 2, 5, 2, 8, 0]]
    assert rows.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2, 2]]
    assert rows.places.tolist() == [0, 1, 2, 3, 4, 5, 10, 14]
    sources = rows.sources.view(4, 4)
    assert sources[attention.bool()].tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 6, 4, 5, 7]
    states = torch.arange(8.0)[None, :, None]
    assert rows.at_places(states)[2, :3, 0].tolist() == [0, 1, 6]
    # heads and width of one
    padded = rows.pad(states[:, None])
    assert padded.shape == (4, 1, 4, 1) and padded[3, 0, :3, 0].tolist() == [4, 5, 7]
    assert rows.unpad(padded.transpose(1, 2)).flatten().tolist() == list(range(8))

    apart = PairRows.of(ids, attention)
    assert apart.ids.tolist() == [[5, 6, 7, 2, 5, 2, 5, 6, 8, 5, 2, 0]]


def test_padding_before_a_token_is_seen():
    assert is_right_padded(torch.tensor([[1, 1, 0], [1, 1, 1]]))
    assert not is_right_padded(torch.tensor([[1, 1, 0], [0, 1, 1]]))


def model_of(kind, use_peft, task="CAUSAL_LM"):
    # SFT trains with dropout, which is drawn anew
    still = {"dropout": 0.0, "layerdrop": 0.0} if kind == "opt" else {}
    model, tokenizer = build(kind, **still)
    initial = InitialModel(model, tokenizer, "x", "x", None, "x")
    torch.manual_seed(1)
    lora = lora_config(task, r=2) if use_peft else None
    trained = (
        trainable_reward(initial, lora) if task == "SEQ_CLS" else trainable_policy(initial, lora)
    )
    return trained, tokenizer


def trainer_of(program, kind, folder, use_peft=True, **options):
    """A trainer on PAIRS in one batch, whose adapter does something."""
    config = {"sft": SFTConfig, "dpo": DPOConfig, "reward": RewardConfig}[program]
    given = {"args": config(str(folder), use_cpu=True, bf16=False, report_to="none",
                            gradient_checkpointing=False,
                            **{"max_length": None} | options)}  # fmt: skip
    model, tokenizer = model_of(kind, use_peft, "SEQ_CLS" if program == "reward" else "CAUSAL_LM")
    if program == "sft":
        rows = [{"input_ids": p + a, "labels": [-100] * len(p) + a} for p, a, _ in PAIRS]
        cls = SFTTrainer
    elif program == "reward":
        rows = [{"chosen_ids": p + a, "rejected_ids": p + b} for p, a, b in PAIRS]
        cls, given["data_collator"] = RewardTrainer, PairCollator(0)
    else:
        rows = [{"prompt_ids": p, "chosen_ids": a, "rejected_ids": b} for p, a, b in PAIRS]
        cls = EncodedDPOTrainer
        given["ref_model"] = None if use_peft else model_of(kind, False)[0]
        if use_peft:
            frozen_copy(model, "default", "ref")
    data = Dataset.from_list(rows)
    trainer = cls(
        model=model, train_dataset=data, eval_dataset=data, processing_class=tokenizer, **given
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return trainer


def numbers_of(trainer):
    """Return loss, gradients, metrics and the tokens that have gone through the trunk."""
    tokens = []
    decoder_and_head(trainer.model)[0].get_input_embeddings().register_forward_hook(
        lambda module, args, output: tokens.append(output[..., 0].numel())
    )
    batch = next(iter(trainer.get_eval_dataloader()))
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()
    grads = {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}
    return loss.item(), grads, {k: v[-1] for k, v in trainer._metrics["train"].items()}, tokens


def check_equal(program, kind, folder, use_peft=True, **options):
    """Check a trainer with packed rows against TRL's own; return the tokens of both."""
    with pytest.MonkeyPatch.context() as patch:
        # the reward model packs rows by itself
        patch.setattr("reward.model.packs", lambda model, length: False)
        padded = numbers_of(trainer_of(program, kind, folder, use_peft, **options))
    trainer = trainer_of(program, kind, folder, use_peft, **options)
    prepare_trainer(trainer)
    packed = numbers_of(trainer)
    assert packed[0] == pytest.approx(padded[0], abs=1e-6)
    assert packed[1].keys() == padded[1].keys() and packed[1]
    assert any(grad.abs().max() > 1e-3 for grad in padded[1].values())
    for name, grad in padded[1].items():
        torch.testing.assert_close(packed[1][name], grad, atol=1e-6, rtol=1e-4, msg=name)
    assert packed[2] == pytest.approx(padded[2], abs=2e-6, rel=1e-6)
    return padded[3], packed[3]


@pytest.mark.parametrize("use_peft", [True, False])
@pytest.mark.parametrize(
    ("program", "kind"),
    [
        *((program, kind) for program in ("sft", "reward", "dpo") for kind in ("llama", "opt")),
        # they scale their logits
        ("sft", "cohere"),
        ("dpo", "cohere"),
    ],
)
def test_packed_rows_give_trls_loss_gradients_and_metrics(tmp_path, program, kind, use_peft):
    padded, packed = check_equal(program, kind, tmp_path, use_peft)
    # TRL's own head, for logits that are scaled and for one that learns, takes rows apart
    shares = program == "reward" or (program == "dpo" and use_peft and kind != "cohere")
    apart = sum(len(p) + len(a) for p, a, _ in PAIRS)
    if program != "sft":
        apart += sum(len(p) + len(b) for p, _, b in PAIRS)
    once = PAIR_TOKENS if shares else apart
    # in DPO the policy and, under an adapter, the reference on the same trunk
    assert set(packed) == {once} and min(padded) > once and len(packed) == len(padded)


# states that run on over the rows, and a window that is shorter than the rows
@pytest.mark.parametrize("kind", ["mamba", "mistral"])
def test_models_for_which_packed_rows_are_another_function_are_padded(tmp_path, kind):
    padded, packed = check_equal("dpo", kind, tmp_path)
    assert packed == padded


def test_a_router_loss_is_over_padded_rows_as_trl_has_it(tmp_path):
    padded, packed = check_equal("dpo", "qwen3_moe", tmp_path, router_aux_loss_coef=0.1)
    # the reference, which has no such loss, then the policy
    assert packed == [PAIR_TOKENS, padded[1]]


def test_a_loss_that_reads_more_of_the_head_has_it(tmp_path):
    padded, packed = check_equal("dpo", "llama", tmp_path, use_weighting=True)
    assert max(packed) < min(padded)


def test_weights_of_a_part_of_the_head_are_trained(tmp_path, monkeypatch):
    """A row of the head that learns beside LoRA, as for an EOS token that was never trained."""
    whole = lora_config

    def with_row(*args, **kwargs):
        config = whole(*args, **kwargs)
        config.trainable_token_indices = [2]
        return config

    monkeypatch.setitem(globals(), "lora_config", with_row)
    check_equal("sft", "llama", tmp_path)


def test_trls_packing_keeps_rows_apart(tmp_path):
    apart = numbers_of(trainer_of("sft", "llama", tmp_path))
    packed = trainer_of("sft", "llama", tmp_path, packing=True, max_length=64, eval_packing=True)
    prepare_trainer(packed)
    loss, grads, _, tokens = numbers_of(packed)
    assert loss == pytest.approx(apart[0], abs=1e-6)
    for name, grad in apart[1].items():
        torch.testing.assert_close(grads[name], grad, atol=1e-6, rtol=1e-4, msg=name)
    # all three rows in one
    assert tokens == [sum(len(p) + len(a) for p, a, _ in PAIRS)]


@pytest.mark.parametrize("options", [{"padding_free": True}, {"packing": True, "max_length": 64}])
@pytest.mark.parametrize("kind", ["llama", "cohere"])
def test_trls_packing_costs_what_its_rows_cost(tmp_path, kind, options):
    """A mask over the whole pack, (9 + 8 + 7)^2 scores for three rows of 9, would cost more."""

    def budget_of(**options):
        trainer, budget = trainer_of("sft", kind, tmp_path, max_steps=1, **options), Budget()
        budget.watch(trainer.model)
        prepare_trainer(trainer)
        count_training(trainer, budget)
        trainer.train()
        return budget.tokens_trained, budget.flops

    apart = budget_of()
    assert apart[0] == sum(len(p) + len(a) for p, a, _ in PAIRS) and apart[1] > 0
    assert budget_of(**options) == apart


def test_trls_packing_is_refused_where_rows_would_be_mixed(tmp_path):
    trainer = trainer_of("sft", "mamba", tmp_path, packing=True, max_length=64)
    with pytest.raises(UserError, match="mix the rows of a mamba model"):
        prepare_trainer(trainer)


@pytest.mark.parametrize(
    ("lengths", "is_cheaper"),
    [
        # 4 rows of 8 padded to 8: 4 * 64 pairs of 32 * 32
        ([8, 8, 8, 8], True),
        # 9 rows padded to 16: 144 positions of 32 tokens
        ([16, 2, 2, 2, 2, 2, 2, 2, 2], False),
        # 3 rows padded to 30: 90 positions of 34 tokens, but 3 * 900 pairs of 34 * 34
        ([30, 2, 2], False),
        ([7], True),
    ],
)
def test_packs_are_taken_apart_where_padding_costs_less(lengths, is_cheaper):
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    assert pays({"cu_seq_lens_q": bounds}) is is_cheaper

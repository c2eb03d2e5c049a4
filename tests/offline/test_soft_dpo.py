"""Soft labels and weights in DPO: the formula on numbers, and the trainer against TRL's own."""

import math

import pytest
import torch
from datasets import Dataset
from trl import DPOConfig

from rlhf.data.records import Preference
from rlhf.model.adapters import lora_config
from rlhf.model.loading import load_model, trainable_policy
from rlhf.offline.reference_cache import ReferenceCache, ReferencePass
from rlhf.offline.soft_dpo import (
    EncodedDPOTrainer,
    SoftCollator,
    SoftDPOTrainer,
    soft_dpo_loss,
    soft_rows,
    unsupported_option,
)
from rlhf.offline.trainers import prepare_trainer
from rlhf.ranks.distributed import DistributedContext
from tests.kinds import build

NAN = math.nan


def test_the_formula_by_hand():
    # beta * delta = 0.5 * 2 = 1; log sigmoid(1) = -0.3132617, log sigmoid(-1) = -1.3132617
    # p = 0.75, w = 2: 2 * (0.75 * 0.3132617 + 0.25 * 1.3132617) = 2 * 0.5632617
    delta = torch.tensor([2.0, 2.0, -2.0, 2.0])
    rows = soft_dpo_loss(
        delta,
        0.5,
        label_prob=torch.tensor([0.75, 1.0, 1.0, 0.5]),
        weight=torch.tensor([2.0, 1.0, 1.0, 0.0]),
    )
    assert rows.tolist() == pytest.approx([1.1265234, 0.3132617, 1.3132617, 0.0], abs=1e-6)


def test_label_smoothing_is_for_rows_without_a_label_of_their_own():
    delta, soft = torch.tensor([2.0, 2.0]), torch.tensor([NAN, 1.0])
    rows = soft_dpo_loss(delta, 0.5, label_prob=soft, label_smoothing=0.1)
    # -log s(-x) = x - log s(x), x = 1
    assert rows.tolist() == pytest.approx([0.3132617 + 0.1, 0.3132617], abs=1e-6)
    assert soft_dpo_loss(delta, 0.5).tolist() == pytest.approx([0.3132617] * 2, abs=1e-6)


def test_the_loss_is_least_where_the_model_says_the_label_prob():
    p, beta = 0.8, 0.3
    delta = torch.tensor([math.log(p / (1 - p)) / beta], requires_grad=True)
    soft_dpo_loss(delta, beta, label_prob=torch.tensor([p])).sum().backward()
    assert delta.grad.item() == pytest.approx(0.0, abs=1e-7)


def encoded(prompt, chosen, rejected, **more):
    record = Preference(prompt=[{"role": "user", "content": "q"}], chosen="a", rejected="b", **more)
    return {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected, "record": record}


def test_rows_carry_only_what_the_data_has_and_weights_have_mean_one():
    assert soft_rows([encoded([5], [2], [3])]) == [
        {"prompt_ids": [5], "chosen_ids": [2], "rejected_ids": [3]}
    ]
    rows = soft_rows([encoded([5], [2], [3], weight=3.0), encoded([5], [2], [3], label_prob=0.75)])
    assert [row["weight"] for row in rows] == [1.5, 0.5]
    assert math.isnan(rows[0]["label_prob"]) and rows[1]["label_prob"] == 0.75


PAIRS = [([5, 6], [7, 2], [8, 9, 2]), ([5], [4, 4, 4, 2], [9, 2])]
SOFT = [{"label_prob": 0.8, "weight": 3.0}, {"weight": 1.0}]


def trainer_of(cls, base_path, folder, rows, use_peft=True, distance=0.05, given=None, **options):
    """A DPO trainer whose policy is a small step away from its reference."""
    initial = load_model(base_path)
    torch.manual_seed(1)  # of a new adapter
    model = trainable_policy(initial, lora_config(r=2) if use_peft else None)
    reference = None if use_peft else load_model(base_path).model
    arguments = DPOConfig(
        str(folder),
        use_cpu=True,
        bf16=False,
        report_to="none",
        gradient_checkpointing=False,
        max_length=None,
        **options,
    )
    data = Dataset.from_list(rows)
    trainer = cls(
        model=model,
        ref_model=reference,
        args=arguments,
        data_collator=SoftCollator(pad_token_id=0) if cls is SoftDPOTrainer else None,
        train_dataset=data,
        eval_dataset=data,
        processing_class=initial.tokenizer,
        **given or {},
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(distance * torch.randn_like(parameter))
    return trainer


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"modules_to_save": ["norm", "lm_head"]},
        {"trainable_token_indices": [2]},
    ],
)
@pytest.mark.parametrize("precompute", [False, True])
def test_the_reference_is_the_whole_start(base_path, tmp_path, settings, precompute):
    from tests.conftest import random_adapter

    initial = load_model(random_adapter(base_path, tmp_path / "sft", seed=5, **settings))
    trainer = EncodedDPOTrainer(
        model=trainable_policy(initial, None),
        args=DPOConfig(
            str(tmp_path),
            use_cpu=True,
            bf16=False,
            report_to="none",
            max_length=None,
            precompute_ref_log_probs=precompute,
        ),
        train_dataset=Dataset.from_list(soft_rows([encoded(*ids) for ids in PAIRS])),
        processing_class=initial.tokenizer,
    )
    loss = trainer.compute_loss(trainer.model, dict(next(iter(trainer.get_train_dataloader()))))
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6)  # policy and reference are one


def loss_of(trainer):
    batch = next(iter(trainer.get_eval_dataloader()))  # both rows, through Arrow, in order
    loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()
    grads = [p.grad.clone() for p in trainer.model.parameters() if p.grad is not None]
    return (
        loss.item(),
        grads,
        {k: v[-1] for k, v in trainer._metrics["eval"].items()}
        | {k: v[-1] for k, v in trainer._metrics["train"].items()},
    )


@pytest.mark.parametrize("use_peft", [True, False])
def test_the_first_loss_is_log_2_where_dropout_is_called_as_a_function(tmp_path, use_peft):
    model, tokenizer = build("opt", dropout=0.3)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    rows = soft_rows([encoded(*ids) for ids in PAIRS])
    trainer = trainer_of(EncodedDPOTrainer, str(tmp_path), tmp_path, rows, use_peft, distance=0.0)
    prepare_trainer(trainer)
    trainer.model.train()
    if trainer.ref_model is not None:
        trainer.ref_model.train()
    assert loss_of(trainer)[0] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("use_peft", [True, False])
def test_certain_labels_give_trls_loss_gradients_and_metrics(base_path, tmp_path, use_peft):
    certain = soft_rows([encoded(*ids, label_prob=1.0) for ids in PAIRS])
    ours = trainer_of(SoftDPOTrainer, base_path, tmp_path, certain, use_peft)
    theirs = trainer_of(
        EncodedDPOTrainer,
        base_path,
        tmp_path,
        soft_rows([encoded(*ids) for ids in PAIRS]),
        use_peft,
    )
    (loss, grads, metrics), (expected, expected_grads, expected_metrics) = (
        loss_of(ours),
        loss_of(theirs),
    )
    # not at the reference
    assert loss == pytest.approx(expected, abs=1e-6) and abs(expected - math.log(2)) > 1e-3
    assert len(grads) == len(expected_grads) > 0
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, atol=1e-6, rtol=1e-5)
    assert metrics == pytest.approx(expected_metrics, abs=1e-5) and "rewards/margins" in metrics


@pytest.mark.parametrize("use_peft", [True, False])
def test_the_trainer_minimises_the_formula(base_path, tmp_path, use_peft):
    rows = soft_rows([encoded(*ids, **soft) for ids, soft in zip(PAIRS, SOFT, strict=True)])
    trainer = trainer_of(
        SoftDPOTrainer, base_path, tmp_path, rows, use_peft, beta=0.3, label_smoothing=0.1
    )
    loss, grads, _ = loss_of(trainer)
    deltas = []
    # one pair at a time, read off TRL's own metrics: beta * delta = chosen - rejected reward
    for ids in PAIRS:
        alone = trainer_of(
            EncodedDPOTrainer, base_path, tmp_path, soft_rows([encoded(*ids)]), use_peft, beta=0.3
        )
        deltas.append(loss_of(alone)[2]["rewards/margins"] / 0.3)
    # label_prob 0.8 and, by label smoothing, 0.9; weights 3 and 1 over their mean 2
    expected = sum(
        w
        * -(
            p * math.log(1 / (1 + math.exp(-0.3 * d)))
            + (1 - p) * math.log(1 / (1 + math.exp(0.3 * d)))
        )
        for d, p, w in zip(deltas, (0.8, 0.9), (1.5, 0.5), strict=True)
    )
    assert loss == pytest.approx(expected / 2, abs=1e-5) and any(g.abs().sum() > 0 for g in grads)


def test_it_trains_with_precomputed_reference(base_path, tmp_path):
    rows = soft_rows([encoded(*ids, **soft) for ids, soft in zip(PAIRS, SOFT, strict=True)])
    once = {"max_steps": 1, "save_strategy": "no", "disable_tqdm": True}
    trainer = trainer_of(
        SoftDPOTrainer, base_path, tmp_path, rows, precompute_ref_log_probs=True, **once
    )
    plain = trainer_of(SoftDPOTrainer, base_path, tmp_path, rows, **once)
    assert trainer.train().training_loss == pytest.approx(plain.train().training_loss, abs=1e-5)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, None),
        ({"loss_type": ["ipo"]}, "loss_type ipo"),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1, 0.1]}, "loss_type sigmoid, sft"),
        ({"loss_weights": [0.5]}, "loss_weights"),
        ({"f_divergence_type": "js_divergence"}, "f_divergence_type"),
        ({"use_weighting": True}, "use_weighting"),
        ({"ld_alpha": 0.5}, "ld_alpha"),
    ],
)
def test_what_soft_labels_do_not_go_with(tmp_path, options, reason):
    assert (
        unsupported_option(DPOConfig(str(tmp_path), use_cpu=True, bf16=False, **options)) == reason
    )


def cache_of(said, key="model"):
    return ReferenceCache(key, DistributedContext(), said.append)


@pytest.mark.parametrize("cls", [EncodedDPOTrainer, SoftDPOTrainer])
@pytest.mark.parametrize("use_peft", [True, False])
def test_a_second_run_makes_no_reference_pass(base_path, tmp_path, cls, use_peft):
    rows = [encoded(*ids, **soft) for ids, soft in zip(PAIRS, SOFT, strict=True)]
    rows = soft_rows([*rows, encoded([5, 5], [7, 7, 2], [2])])
    if cls is EncodedDPOTrainer:
        rows = [{n: ids for n, ids in row.items() if n.endswith("_ids")} for row in rows]
    whole = {"per_device_train_batch_size": 2, "num_train_epochs": 2, "save_strategy": "no"}
    logged, passes, said = [], [], []
    for beta, keeps in ((0.1, False), (0.1, True), (0.3, False), (0.3, True)):
        given = {"reference_cache": cache_of(said)} if keeps else {}
        trainer = trainer_of(
            cls, base_path, tmp_path, rows, use_peft, beta=beta, logging_steps=1,
            disable_tqdm=True, given=given, **whole,
        )  # fmt: skip
        count, compute = [0], trainer.compute_ref_log_probs

        def counted(model, inputs, count=count, compute=compute):
            count[0] += len(inputs["input_ids"])
            return compute(model, inputs)

        trainer.compute_ref_log_probs = counted
        if keeps:
            trainer.add_callback(ReferencePass(trainer, said.append))
        trainer.train()
        trainer.evaluate()
        logged.append(trainer.state.log_history)
        passes.append(count[0])
    # 6 sequences in each of 2 epochs and an evaluation; once for training and evaluation; never
    assert passes == [18, 6, 18, 0]
    assert [line.partition(" reference")[0] for line in said] == ["0 of 6", "6 of 6"]
    for plain, kept in (logged[:2], logged[2:]):
        for expected, found in zip(plain, kept, strict=True):
            for name in expected.keys() - {"train_runtime", "eval_runtime"}:
                if not name.endswith("_per_second"):
                    assert found[name] == pytest.approx(expected[name], abs=1e-6), name


def test_steps_that_make_no_whole_pass_compute_the_pairs_that_they_meet(base_path, tmp_path):
    rows = soft_rows([encoded([5] * n, [7, 2], [2]) for n in range(1, 9)])
    said, passes = [], []
    for _ in range(2):
        cache = cache_of(said)
        trainer = trainer_of(
            EncodedDPOTrainer, base_path, tmp_path, rows, given={"reference_cache": cache},
            per_device_train_batch_size=1, max_steps=1, save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        trainer.eval_dataset = None
        trainer.add_callback(ReferencePass(trainer, said.append))
        before = len(cache.known)
        trainer.train()
        passes.append((before, len(cache.known)))
    # one pair of two sequences, the same one in both runs
    assert passes == [(0, 2), (2, 2)] and all("0 of 0 " in line for line in said)

"""From encoded pairs to the loss: columns, padding, and that the trainer minimises exactly
reward_loss.
"""

import math

import pytest
import torch
from datasets import Dataset
from trl import RewardConfig

from reward.length import add_offsets
from reward.model import raw_scores, trainable_reward
from reward.objective import pair_log_loss, reward_loss, tie_probability
from reward.ties import TieParameter
from reward.trainer import PairCollator, RewardTrainer, pair_rows
from rlhf.data.records import Preference
from rlhf.model.adapters import lora_config
from rlhf.model.loading import load_model

SIDES = ("chosen_ids", "rejected_ids")


def encoded(prompt, chosen, rejected, **more):
    record = Preference(prompt=[{"role": "user", "content": "q"}], chosen="a", rejected="b", **more)
    return {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected, "record": record}


def test_rows_hold_whole_sequences_and_only_the_extras_there_are():
    assert pair_rows([encoded([5, 6], [7, 2], [8, 2])]) == [
        {"chosen_ids": [5, 6, 7, 2], "rejected_ids": [5, 6, 8, 2]}
    ]


def test_extras_fill_in_where_a_row_has_none_and_weights_have_mean_one():
    rows = pair_rows(
        [
            encoded([5], [2], [3], margin=0.5, weight=3.0),
            encoded([5], [2], [3], label_prob=0.75, weight=1.0),
        ]
    )
    assert [row["margin"] for row in rows] == [0.5, 0.0]
    assert math.isnan(rows[0]["label_prob"]) and rows[1]["label_prob"] == 0.75
    assert [row["weight"] for row in rows] == [1.5, 0.5]  # 3 and 1 over their mean 2


def test_collator_puts_chosen_first_and_pads_right():
    rows = [
        {"chosen_ids": [5, 6, 2], "rejected_ids": [5, 2], "label_prob": None},
        {"chosen_ids": [7, 2], "rejected_ids": [0], "label_prob": 0.9},
    ]
    batch = PairCollator(pad_token_id=0)(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 2], [7, 2, 0], [5, 2, 0], [0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0], [1, 1, 0], [1, 0, 0]]
    assert batch["label_prob"].isnan().tolist() == [True, False]
    assert "margin" not in batch


def test_the_trainer_minimises_our_objective(base_path, tmp_path):
    initial = load_model(base_path)
    model = trainable_reward(initial, lora_config("SEQ_CLS", r=2))
    rows = pair_rows(
        [
            encoded([5, 6], [7, 2], [8, 9, 2], label_prob=0.8, weight=2.0),
            encoded([5], [4, 4, 4, 2], [0], margin=0.25, weight=1.0),
        ]
    )
    arguments = RewardConfig(
        str(tmp_path), use_cpu=True, bf16=False, center_rewards_coefficient=0.1, report_to="none"
    )
    trainer = RewardTrainer(
        model=model,
        args=arguments,
        data_collator=PairCollator(0),
        train_dataset=Dataset.from_list(rows),
        processing_class=initial.tokenizer,
        label_smoothing=0.1,
    )
    # through Arrow, in order
    batch = next(iter(trainer.get_eval_dataloader(Dataset.from_list(rows))))
    found = trainer.compute_loss(model, dict(batch)).item()
    chosen, rejected = (
        torch.tensor(raw_scores(model, [r[side] for r in rows], 0))
        for side in ("chosen_ids", "rejected_ids")
    )
    expected, metrics = reward_loss(
        chosen,
        rejected,
        margin=torch.tensor([0.0, 0.25]),
        label_prob=torch.tensor([0.8, math.nan]),
        weight=torch.tensor([4 / 3, 2 / 3]),
        label_smoothing=0.1,
        center_coefficient=0.1,
    )
    assert found == pytest.approx(expected.item(), abs=1e-5)
    mode = "train" if model.training else "eval"
    assert trainer._metrics[mode]["accuracy"][-1] == metrics["accuracy"].item()


def test_an_evaluation_has_the_log_loss_of_all_pairs_with_their_ties(base_path, tmp_path):
    """Three pairs in batches of two: the mean is over pairs, not over batches."""
    initial = load_model(base_path)
    model = trainable_reward(initial, lora_config("SEQ_CLS", r=2))
    rows = pair_rows(
        [
            encoded([5, 6], [7, 2], [8, 9, 2], label_prob=0.5, tie_prob=1.0),
            encoded([5], [4, 4, 4, 2], [0], margin=0.25),
            encoded([5, 7], [4, 2], [9, 8, 2]),
        ]
    )
    add_offsets(rows, 0.3)
    ties = TieParameter(0.25, torch.as_tensor)
    arguments = RewardConfig(
        str(tmp_path), use_cpu=True, bf16=False, per_device_eval_batch_size=2, report_to="none"
    )
    trainer = RewardTrainer(
        model=model,
        args=arguments,
        data_collator=PairCollator(0),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows),
        processing_class=initial.tokenizer,
        ties=ties,
    )
    found = trainer.evaluate()["eval_log_loss"]
    scores = [torch.tensor(raw_scores(model, [r[side] for r in rows], 0)) for side in SIDES]
    # the mean over batches is of both answers, in the last batch of one pair too
    both = torch.stack(scores)
    mean = (both[:, :2].mean() + both[:, 2].mean()) / 2
    assert trainer.state.log_history[-1]["eval_mean_reward"] == pytest.approx(mean.item(), abs=1e-5)
    # offsets: 0.3 a token; margins are no part of the likelihood
    d = scores[0] - scores[1] + torch.tensor([-0.3, 0.9, -0.3])
    p, tie = torch.tensor([0.5, 1.0, 1.0]), torch.tensor([1.0, 0.0, 0.0])
    expected = pair_log_loss(d, p, tie, ties.log_tie)
    assert found == pytest.approx(expected.mean().item(), abs=1e-5)

    # in training the tie parameter sees what the loss sees, margin and all, and an evaluation nothing
    assert ties.sums == [0.0, 0.0, 0.0]
    model.train()
    trainer.compute_loss(model, dict(next(iter(trainer.get_eval_dataloader()))))
    seen = d[:2] - torch.tensor([0.0, 0.25])
    assert ties.sums[:2] == pytest.approx(
        [2.0, tie_probability(seen, ties.log_tie).sum().item()], abs=1e-5
    )

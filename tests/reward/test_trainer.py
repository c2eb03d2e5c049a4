"""From encoded pairs to the loss: columns, padding, and that the trainer minimises exactly
reward_loss.
"""

import math

import pytest
import torch
from datasets import Dataset
from trl import RewardConfig

from reward.model import raw_scores, trainable_reward
from reward.objective import reward_loss
from reward.trainer import PairCollator, RewardTrainer, pair_rows
from rlhf.adapters import lora_config
from rlhf.data.records import Preference
from rlhf.models import load_model


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

from types import SimpleNamespace

import pytest
from trl import DPOConfig, SFTConfig

from rlhf.errors import UserError
from rlhf.offline.trainers import check_schedule, refused_by_trl, train, trl_overrides


def overrides(cls=SFTConfig, **trl):
    return trl_overrides(
        cls, SimpleNamespace(trl=trl, learning_rate=1e-4, max_steps=5, beta=0.1, output_dir="x")
    )


def test_values_under_trl_have_the_type_of_their_field():
    given = {
        "dataset_num_proc": "2",
        "adam_beta2": "9.5e-1",
        "packing": "yes",
        "optim": "adafactor",
    }
    assert overrides(**given) == {
        "dataset_num_proc": 2,
        "adam_beta2": 0.95,
        "packing": True,
        "optim": "adafactor",
    }
    assert overrides(lr_scheduler_kwargs={"min_lr": 1e-6}) == {
        "lr_scheduler_kwargs": {"min_lr": 1e-6}
    }
    assert overrides(DPOConfig, loss_weights=[0.5, 1]) == {"loss_weights": [0.5, 1.0]}


@pytest.mark.parametrize(
    ("trl", "said"),
    [
        (
            {"dataset_num_proc": "many"},
            "trl: 'dataset_num_proc': expected a whole number, found 'many'",
        ),
        ({"packing": 3}, "trl: 'packing': expected true or false, found 3"),
        ({"adam_beta3": 1}, "trl: 'adam_beta3' is no option of SFTConfig. Did you mean 'adam_beta"),
    ],
)
def test_values_under_trl_that_cannot_be_used_are_refused(trl, said):
    with pytest.raises(UserError, match=said):
        overrides(**trl)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "One of min_lr or min_lr_rate should be set"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "num_decay_steps"),
        ({"optim": "lomo"}, "lomo"),
        ({"adam_beta1": 1.5}, "Invalid beta parameter"),
    ],
)
def test_a_schedule_or_optimizer_that_lacks_something_is_refused_before_training(
    tmp_path, options, said
):
    plain = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "report_to": "none"}
    check_schedule(SFTConfig(**plain, lr_scheduler_type="cosine", warmup_steps=0.1))
    with pytest.raises(UserError, match=f"TRL refuses these options: .*{said}"), refused_by_trl({}):
        check_schedule(SFTConfig(**plain, **options))


@pytest.mark.parametrize(
    ("rows", "held_out", "said"), [(7, 9, "all 7 rows"), (9, 3, "all 3 held-out rows")]
)
def test_dropping_the_last_batch_must_leave_one(rows, held_out, said):
    # 4 rows on each of 2 ranks
    arguments = SimpleNamespace(train_batch_size=4, dataloader_drop_last=True)
    trainer = SimpleNamespace(
        train_dataset=range(rows), eval_dataset=range(held_out), args=arguments
    )
    callback = SimpleNamespace(run=SimpleNamespace(world=SimpleNamespace(size=2)))
    with pytest.raises(UserError, match=f"drops {said}, since a batch is 8. Leave it out"):
        train(trainer, callback)

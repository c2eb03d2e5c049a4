"""launch/dpo.py with soft labels, and the options it refuses."""

import json

import pytest

from rlhf.errors import EXIT_USER_ERROR
from tests.launch.conftest import SHORT, SMALL, door


def pairs(folder, soft):
    rows = [
        {"prompt": f"where is parcel {n}?", "chosen": f"happy to help {n}", "rejected": f"no {n}"}
        | (soft if n % 2 else {})
        for n in range(40)
    ]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder / "pairs.jsonl")


def run(base_path, folder, soft, *more):
    arguments = [
        "--model_name_or_path",
        base_path,
        "--data",
        pairs(folder, soft),
        "--output_dir",
        str(folder / "run"),
    ]
    door("dpo")(
        [*arguments, *SHORT, *SMALL, "--eval_prompts", "0", "--validation_fraction", "0.2", *more]
    )
    return json.loads((folder / "run" / "result.json").read_text())["headline"]["eval/loss/total"]


def test_soft_labels_are_read_and_change_the_loss(base_path, tmp_path, capsys):
    # at the reference every loss is log 2 for a row of weight 1
    still = ("--learning_rate", "1e-12")
    loss = run(base_path, tmp_path, {"label_prob": 0.7, "weight": 3.0, "margin": 0.5}, *still)
    said = capsys.readouterr().out
    assert (
        "the loss reads label_prob and weight of the pairs" in said
        and "the reward model reads and DPO does not" in said
    )
    assert loss == pytest.approx(0.6931, abs=0.05)


def test_other_losses_say_that_they_do_not_read_them(base_path, tmp_path, capsys):
    run(base_path, tmp_path, {"label_prob": 0.7}, "--loss_type", "ipo")
    assert "loss_type ipo does not read label_prob of the pairs" in capsys.readouterr().out


def test_a_run_with_another_beta_makes_no_reference_pass_and_pays_for_one(
    base_path, tmp_path, capsys
):
    # a whole pass and more
    epochs = ("--max_steps", "-1", "--num_train_epochs", "2")
    losses, flops, reference = [], [], []
    for beta, soft in (("0.1", {}), ("0.3", {}), ("0.3", {"label_prob": 0.8})):
        folder = tmp_path / f"{beta}{len(soft)}"
        folder.mkdir()
        losses.append(run(base_path, folder, soft, *epochs, "--beta", beta))
        result = json.loads((folder / "run" / "result.json").read_text())
        flops.append(result["budget"]["budget/flops"])
        reference.append(result["budget"]["budget/reference_flops"])
    said = [
        line.partition("dpo: ")[2].partition(" reference log-prob")[0]
        for line in capsys.readouterr().out.splitlines()
        if "from the cache" in line
    ]
    rows = said[1].split(" of ")[1]
    assert said == [f"0 of {rows}", f"{rows} of {rows}", f"{rows} of {rows}"]
    assert flops == pytest.approx([flops[0]] * 3, rel=1e-9)
    assert reference == pytest.approx([reference[0]] * 3, rel=1e-9)
    assert 0 < reference[0] < flops[0]
    # all responses are new; 21 / 4 steps are a pass
    sizes = {"held_out": 13, "training": 21, "per_step": 4, "steps": 6}
    assert result["reference_pass"] == sizes

    # without the cache, and with one that is filled: the same
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    moved = ("--trl", "{precompute_ref_log_probs: true}")
    assert run(base_path, fresh, {}, *epochs, "--beta", "0.3", *moved) == pytest.approx(
        losses[1], abs=1e-6
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--loss_type", "hinge", "--label_smoothing", "0.1"], "no effect on loss_type hinge"),
        (["--label_smoothing", "0.5"], "expected at least 0 and less than 0.5"),
        (
            ["--label_smoothing", "0.1", "--trl", "{use_weighting: true}"],
            "does not go with use_weighting",
        ),
    ],
)
def test_label_smoothing_that_would_do_nothing_is_refused(
    base_path, tmp_path, capsys, flags, message
):
    with pytest.raises(SystemExit) as stopped:
        run(base_path, tmp_path, {}, *flags)
    assert stopped.value.code == EXIT_USER_ERROR and message in capsys.readouterr().err

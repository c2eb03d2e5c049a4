"""What the reward program reports about the model it has trained."""

from itertools import chain, compress, islice
from typing import Any

import torch

from reward.cards.card import report_card
from reward.cards.on_policy import same_policy
from reward.cards.page import write_card
from reward.cards.pairs import ScoredPairs, with_a_winner
from reward.cards.verdict import doubts
from reward.model import raw_scores
from reward.trainer import RewardTrainer
from rlhf.data.records import Preference
from rlhf.offline.pair_columns import column_tensors
from rlhf.ranks.divided import readable
from rlhf.runs.run import Run


def score_rows(run: Run, trainer: Any, *parts: list[list[int]]) -> list[list[float]]:
    """Return the raw scores of each part's rows of ids; each rank scores its share, and gets all."""
    rows = list(chain.from_iterable(parts))
    own = run.world.share_of(rows)
    batch_size = 2 * run.config.per_device_train_batch_size
    with readable(trainer.model, world=run.world):
        scores = run.world.gather(
            raw_scores(trainer.model, own, trainer.processing_class.pad_token_id, batch_size)
        )
    remaining = iter(scores)
    return [list(islice(remaining, len(part))) for part in parts]


def as_html(markdown: str) -> str:
    """Return Markdown as HTML without what it may hold of it."""
    from markdown_it import MarkdownIt

    return MarkdownIt("commonmark", {"html": False}).enable("table").render(markdown)


def report(
    run: Run,
    trainer: RewardTrainer,
    held_out: list[dict[str, Any]],
    rows: list[dict[str, Any]],
    chosen: list[float],
    rejected: list[float],
) -> dict[str, float]:
    """Write the report card of the held-out pairs, log its numbers, and return the headline.

    `rows` are those of `pair_rows` for the pairs. The card is of the pairs with a winner.
    """
    step = trainer.state.global_step
    loss, metrics = trainer.loss_of(
        torch.tensor(chosen), torch.tensor(rejected), column_tensors(rows)
    )
    logged = {"eval/loss/total": loss.item(), "eval/reward/mean": metrics.pop("reward").item()}
    for name, value in metrics.items():
        logged[f"eval/reward/{name}"] = value.mean().item()
    has_winner = [row["record"].label_prob != 0.5 for row in held_out]
    if not any(has_winner):
        run.log("WARNING: no held-out pair has a winner: no report card")
        return {"eval/reward/log_loss": logged["eval/reward/log_loss"]}
    run.tracker.log(logged, step)

    columns = (held_out, chosen, rejected)
    decided = [list(compress(column, has_winner)) for column in columns]
    scored = ScoredPairs.of_rows(*decided)
    config = run.config
    training = with_a_winner(run.data.load(Preference, "train"))
    card = report_card(scored, title=run.folder.name, training=training)
    card["rows"] = run.data.row_counts
    card["on_policy"] = same_policy(config.data, config.model_name_or_path, card["accuracy"])
    if run.world.is_main:
        path = write_card(card, config.output_dir)
        run.log(f"report card: {path}")
        run.tracker.images({"reliability": path.with_name("reliability.png")}, step)
        run.tracker.page("card", as_html(path.read_text(encoding="utf-8")))
        run.log(f"verdict: {card['verdict']}")
        for doubt in doubts(card):
            run.log(f"WARNING: {doubt}")

    accuracy, calibration = card["accuracy"], card["calibration"]
    headline = {
        "eval/reward/accuracy_low": accuracy["low"],
        "eval/reward/accuracy_high": accuracy["high"],
        "eval/reward/groups": accuracy["n"],
        "eval/reward/ece": calibration["ece"],
        "eval/reward/ece_expected": calibration["ece_expected"],
        "eval/reward/brier": calibration["brier"],
        "eval/reward/temperature": calibration["temperature"],
        "eval/reward/length_baseline": card["length"]["baseline"]["accuracy"],
    }
    # too few groups have no interval
    return logged | {name: value for name, value in headline.items() if value is not None}

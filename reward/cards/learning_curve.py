"""`rlhf reward learning-curve`: how the accuracy grows with the number of training pairs.

Each point is a training of its own with the run's options on a part of its pairs; the last is the
run itself. All are judged on the pairs that the run held out.
"""

import json
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlhf.config import option, save_options
from rlhf.errors import UserError

FILE = "learning_curve.json"


@dataclass(kw_only=True)
class CurveConfig:
    """Train the reward model of a run on parts of its pairs: would more pairs help?"""

    run: str = option(help="the folder of the reward model's run, which is the curve's last point")
    fractions: list[float] = option(
        [0.125, 0.25, 0.5], "parts of the training pairs, each a training", above=0, below=1
    )
    batch_size: int = option(32, "answers scored together", low=1)

    def validate(self) -> None:
        if sorted(set(self.fractions)) != self.fractions:
            raise UserError(f"'fractions' is {self.fractions}, expected rising numbers")


def learning_curve(config: CurveConfig) -> list[dict[str, Any]]:
    """Train what is missing, write RUN/learning_curve.json and, where there is one, the card again;
    returns the points.

    A training that has ended is not repeated; one that was interrupted goes on. Raises UserError
    where one fails.
    """
    from reward.cards.page import write_card
    from reward.cards.pairs import pairs_of_run, run_config

    trained = run_config(config.run)
    if trained is None:
        raise UserError(f"{config.run}: has no config.yaml, so it is not the folder of a run")
    held_out = pairs_of_run(trained, "validation")
    if not held_out:
        raise UserError(f"{config.run}: its run held out no pairs to judge the curve by")

    # the run itself is the last point
    count = len(pairs_of_run(trained, "train"))
    scored = []
    for fraction in config.fractions:
        limit = max(1, round(fraction * count))
        folder = Path(config.run) / "learning_curve" / str(limit)
        print(f"learning curve: {limit} of {count} training pairs, in {folder}", flush=True)
        train(trained, folder, limit)
        scored.append((limit, judged(str(folder), trained, held_out, config.batch_size)))
    scored.append((count, judged(config.run, trained, held_out, config.batch_size)))

    points = curve(scored)
    text = json.dumps(points, indent=2) + "\n"
    (Path(config.run) / FILE).write_text(text, encoding="utf-8")
    for point in points:
        accuracy = point["accuracy"]["accuracy"]
        print(f"{point['training_pairs']:8d} pairs: {accuracy:.3f} right")
    card_file = Path(config.run) / "card.json"
    if card_file.is_file():
        card = json.loads(card_file.read_text(encoding="utf-8"))
        print(f"report card: {write_card(card | {'learning_curve': points}, config.run)}")
    return points


def train(trained: Any, folder: Path, limit: int) -> None:
    """Train on `limit` pairs with the run's other options, unless that has been done."""
    from reward.cards.pairs import readable_sources, run_config
    from rlhf.model.files import read_json

    sources = readable_sources(trained)
    # what differs from the run itself
    wanted = replace(
        trained, data=sources, limit=limit, output_dir=str(folder), report_to="none", resume="auto"
    )
    result = folder / "result.json"
    # a part that was trained with other options is trained again
    is_same = run_config(folder) == wanted
    if is_same and result.is_file() and read_json(result).get("finished"):
        return
    folder.mkdir(parents=True, exist_ok=True)
    options = folder.with_name(f"{folder.name}.yaml")
    save_options(wanted, options)
    # a program of its own, as it would be typed: it can be interrupted and resumed
    command = [sys.executable, "-m", "launch.reward", "--config", str(options)]
    if result.is_file() and not is_same:
        # of a run that was trained otherwise before
        command += ["--overwrite_output_dir", "true"]
    done = subprocess.run(command, check=False)
    if done.returncode:
        raise UserError(
            f"{folder}: the training on {limit} pairs ended with exit code {done.returncode}; its message is above. "
            "Called again, this command goes on with it"
        )


def judged(folder: str, trained: Any, held_out: list[Any], batch_size: int) -> Any:
    """Return the held-out pairs scored by the model in `folder`."""
    from reward.cards.pairs import score_pairs
    from reward.model import load_reward

    lengths = trained.max_prompt_length, trained.max_response_length
    return score_pairs(load_reward(folder), held_out, *lengths, batch_size=batch_size)


def curve(scored: list[tuple[int, Any]]) -> list[dict[str, Any]]:
    """Return a point for each (training pairs, `ScoredPairs` of the same held-out pairs).

    {"training_pairs", "accuracy", "log_loss" (at a cross-fitted temperature; None with one group),
    "gain": the accuracy less that of the point before, with its interval over groups}.
    """
    from reward.cards.accuracy import accuracy_with_interval, mean_with_interval, pair_accuracy
    from reward.cards.calibration import cross_fitted, log_loss

    points: list[dict[str, Any]] = []
    before = None
    for count, pairs in scored:
        # the same held-out pairs at each point, so that the gain is a paired difference
        right, groups = pair_accuracy(pairs.gaps), pairs.groups
        scaled = cross_fitted(pairs.gaps, groups)
        gain = None
        if before is not None:
            gain = mean_with_interval(right - before, groups, bounds=(-1.0, 1.0))
        points.append(
            {
                "training_pairs": count,
                "accuracy": accuracy_with_interval(right, groups),
                "log_loss": None if scaled is None else log_loss(scaled),
                "gain": gain,
            }
        )
        before = right
    return points

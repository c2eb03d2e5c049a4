"""What a folder knows of its experiment: the options it was run with, and the jobs that follow from
them.
"""

from pathlib import Path

from rlhf.config import parse
from rlhf.errors import UserError
from rlhf.experiment.config import ExperimentConfig
from rlhf.experiment.cost import known_lengths
from rlhf.experiment.plan import plan
from rlhf.jobs.state import PlanState


def load_experiment(folder: str | Path) -> ExperimentConfig:
    """Return the options that an experiment in this folder was run with. UserError if there is
    none.
    """
    file = Path(folder) / "experiment.yaml"
    if not file.is_file():
        raise UserError(
            f"{folder}: no experiment here (experiment.yaml is missing); make one with rlhf experiment run FILE"
        )
    config = parse(ExperimentConfig, ["--config", str(file)], "rlhf experiment run")
    # its paths are relative to where it was run, so from elsewhere they name other files
    if Path(config.output_dir).resolve() != Path(folder).resolve():
        raise UserError(
            f"{folder}: its options say output_dir {config.output_dir}, which is another folder from here. Call from "
            "the directory in which the experiment was run"
        )
    return config


def load_state(config: ExperimentConfig) -> PlanState:
    """Return the jobs of an experiment as far as they are known; nothing is started, refused or
    moved.
    """
    state = PlanState(Path(config.output_dir), lengths=known_lengths(config))
    state.set_jobs(plan(config, state.lengths))
    return state

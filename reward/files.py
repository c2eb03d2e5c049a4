"""What the files of a reward model say without torch, which takes seconds to import."""

from pathlib import Path

from rlhf.errors import UserError
from rlhf.model.files import check_model, is_adapter, read_json, reward_shift
from rlhf.model.weight_files import tensor_names

# how the head's tensor is called in the adapter of a reward model
HEAD = "score.weight"
TRAIN = "Train one with: deepspeed launch/reward.py --config configs/reward.yaml"


def check_reward_files(path: str) -> None:
    """Raise UserError for what cannot be loaded as a reward model, as far as its files tell without
    torch.
    """
    check_model(path)
    reward_shift(path)
    folder = Path(path)
    if is_adapter(path):
        names = tensor_names(folder / "adapter_model.safetensors")
        # of a pickle nothing is known without torch
        if names is not None and not any(name.endswith(HEAD) for name in names):
            raise UserError(
                f"{path}: this adapter has no score head ({HEAD}), so it is a policy, not a reward model. "
                f"{TRAIN}"
            )
    elif (folder / "config.json").is_file():
        kind = (read_json(folder / "config.json").get("architectures") or [""])[0]
        if not kind.endswith("ForSequenceClassification"):
            raise UserError(
                f"{path}: {kind or 'nothing there'} is not a reward model: it has no score head. {TRAIN}"
            )

"""A small world with a known true reward, and the files that its pipeline is configured by."""

import os
from pathlib import Path

CONFIGS = Path(__file__).parent / "configs"
# what is right there: the true ("gold") reward
SHOP_VOICE = CONFIGS / "voice.yaml"


def shown_path(path: Path) -> str:
    """Return `path` as it is typed in the working directory: relative where it lies below it, else
    absolute.
    """
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)

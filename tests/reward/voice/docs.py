"""The commands of the pages about voices with what they print: python -m tests.reward.voice.docs writes it."""

import contextlib
import io
import re
import shlex
import tempfile
from pathlib import Path

from rlhf.cli import main

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "brand-voice.md"
OUTPUTS = ROOT / "benchmarks" / "results" / "2026-11-29-voices.md"
# a command and the block with its output
RUN = re.compile(r"```bash\n(rlhf voice [^\n]*)\n```\n\n```text\n(.*?)```", re.S)


def commands(page: str) -> list[tuple[str, str]]:
    """Return (command, output) of each command of the page that has its output beside it."""
    return RUN.findall(page)


def write_files(page: str, folder: Path) -> None:
    """Write the page's YAML files whose first line names them, and links to what it names besides."""
    for block in re.findall(r"```yaml\n(.*?)```", page, re.S):
        named = re.match(r"# (\S+\.yaml)\n", block)
        if named:
            (folder / named[1]).write_text(block, encoding="utf-8")
    for name in ("configs", "benchmarks"):
        (folder / name).symlink_to(ROOT / name)


def output_of(command: str) -> str:
    """Return what a command prints, its error line included."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            main(shlex.split(command)[1:])
        except SystemExit as exit:
            print(f"(exit code {exit.code})", file=out)
    return out.getvalue()


def write_outputs(path: Path) -> None:
    """Write what the commands of a page print beside them; its files go to a folder of their own."""
    page = path.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        write_files(page, Path(folder))
        page = RUN.sub(
            lambda run: f"```bash\n{run[1]}\n```\n\n```text\n{output_of(run[1])}```", page
        )
    path.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    for path in (PAGE, OUTPUTS):
        write_outputs(path)

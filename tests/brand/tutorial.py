"""The tutorial of docs/brand-voice.md: python -m tests.brand.tutorial runs it and writes its verdict."""

import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.result_rows import add_rows
from tests.reward.voice.docs import PAGE, ROOT, write_files

# the commands, and the block with the verdict
RUN = re.compile(
    r"```bash\n(rlhf sandbox build.*?)```\n\nThe output ends with:\n\n```text\n(.*?)```", re.S
)


def verdict_of(commands: str, folder: Path) -> str:
    """Run the commands in a folder with the page's files; return the verdict that the last prints."""
    write_files(PAGE.read_text(encoding="utf-8"), folder)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for command in commands.splitlines():
        done = subprocess.run(
            [sys.executable, "-m", "rlhf.cli", *shlex.split(command)[1:]],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == 0, done.stdout
    found = re.search(r"^((?:DO NOT )?SHIP.*?)\n\nruns/brand/report.md", done.stdout, re.S | re.M)
    assert found, done.stdout
    return found[1] + "\n"


def gates_of(verdict: str) -> list[tuple[str, str]]:
    """Return (status, gate) of each line of a verdict."""
    return re.findall(r"^(.+?)  +(\w+) +[A-Z]", verdict, re.M)


def rows_of(verdict: str) -> list[dict]:
    """Return the rows of benchmarks/results/brand.json: the verdict, and its gates that passed."""
    first = verdict.splitlines()[0]
    gates = gates_of(verdict)
    passed = sum(status == "passed" for status, _ in gates)
    what = "the tutorial of docs/brand-voice.md on the sandbox"
    values = [
        ("ships", f"{what}: {first}", first.startswith("SHIP"), "== True"),
        ("gates", f"{what}: gates passed, of {len(gates)}", passed, f">= {len(gates)}"),
    ]
    return [
        {
            "id": f"brand-tutorial-{name}",
            "what": text,
            "value": value,
            "bound": bound,
            "command": "python -m tests.brand.tutorial",
        }
        for name, text, value, bound in values
    ]


if __name__ == "__main__":
    page = PAGE.read_text(encoding="utf-8")
    commands, old = RUN.search(page).groups()
    with tempfile.TemporaryDirectory() as folder:
        new = verdict_of(commands, Path(folder))
    PAGE.write_text(page.replace(old, new), encoding="utf-8")
    add_rows(ROOT / "benchmarks" / "results" / "brand.json", rows_of(new))

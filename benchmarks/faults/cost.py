"""Measure what each fault of tests/faults costs: one process of its own, CPU seconds of it and its
children.

    python -m benchmarks.faults.cost PAGE [--heavy 12]

`--heavy`: so many of the faults that need torch, which cost seconds each.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import tempfile
from datetime import date
from pathlib import Path

from benchmarks.paths import ROOT
from tests.conftest import make_model, make_tokenizer, random_adapter, random_reward
from tests.faults.broken import build
from tests.faults.table import FAULTS, Fault, command

HEAD = """# Faults, {day}

{count} of {all} faults, each as a process of its own (`python -m benchmarks.faults.cost PAGE`), one thread. {hold} end
with one message that has its place and remedy, exit code 2 and no traceback, as the table of `tests/faults` asks. Of
the {light} that are seen without torch the slowest costs {slowest:.2f} CPU seconds, the median {median:.2f}; of {heavy}
that need torch and the libraries {heavy_slowest:.1f} and {heavy_median:.1f}.

| fault | message | exit code | CPU s |
|---|---|---|---|
"""


def main() -> None:
    """Run every fault, and write the page."""
    parser = argparse.ArgumentParser()
    parser.add_argument("page", type=Path)
    parser.add_argument("--heavy", type=int, default=10**6)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = make_tokenizer()
        model = make_model(len(tokenizer), tokenizer.pad_token_id, tokenizer.eos_token_id)
        model.save_pretrained(folder / "base")
        tokenizer.save_pretrained(folder / "base")
        sft = random_adapter(str(folder / "base"), folder / "sft0", seed=1)
        reward = random_reward(str(folder / "base"), folder / "reward0", seed=2)
        build(folder, str(folder / "base"), sft, reward)
        made = next(given for given in FAULTS if given.name == "sft --trl {loss_type: nope}")
        earlier = [*command(made)[:-2], "--output_dir", "earlier"]
        subprocess.run(earlier, cwd=folder, env=environment(), capture_output=True, check=True)
        shutil.copy(folder / "rows.jsonl", folder / "earlier")
        rows = []
        light = [given for given in FAULTS if not given.loads]
        heavy = [given for given in FAULTS if given.loads]
        for given in light + heavy[: options.heavy]:
            found = measure(given, folder)
            rows.append({"name": given.name, "loads": given.loads, **found})
            print(json.dumps(rows[-1]), flush=True)
    options.page.with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options.page.write_text(page_of(rows))


def environment() -> dict[str, str]:
    """Return the variables of a start from this checkout."""
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def measure(given: Fault, folder: Path) -> dict:
    """Return exit code, CPU seconds, last message and whether a fault holds."""
    start = os.times()
    variables = environment() | given.environment
    done = subprocess.run(command(given), cwd=folder, env=variables, capture_output=True, text=True)
    end = os.times()
    spent = end.children_user + end.children_system - start.children_user - start.children_system
    subprocess.run(["rm", "-rf", "out"], cwd=folder, check=True)
    lines = done.stderr.strip().splitlines() or [""]
    errors = [number for number, line in enumerate(lines) if line.startswith("error")]
    said = " ".join(lines[errors[-1] :] if errors else lines[-1:])
    is_one = len(errors) == 1 and "Traceback" not in done.stderr
    holds = done.returncode == 2 and is_one and all(word in said for word in given.words)
    return {"code": done.returncode, "cpu": round(spent, 2), "said": said, "holds": holds}


def page_of(rows: list[dict]) -> str:
    """Return the page; a row for each fault."""
    light = sorted(row["cpu"] for row in rows if not row["loads"])
    heavy = sorted(row["cpu"] for row in rows if row["loads"])
    lines = []
    for row in rows:
        # of the folder that all this is in
        plain = re.sub(r"/tmp/\w+/?", "", row["said"])
        said = plain.removeprefix("error: ").replace("|", "\\|")[:150]
        lines.append(f"| `{row['name']}` | {said} | {row['code']} | {row['cpu']:.2f} |")
    head = HEAD.format(
        day=date.today(),
        count=len(rows),
        all=len(FAULTS),
        hold=sum(row["holds"] for row in rows),
        light=len(light),
        slowest=light[-1],
        median=light[len(light) // 2],
        heavy=len(heavy),
        heavy_slowest=max(heavy, default=0.0),
        heavy_median=heavy[len(heavy) // 2] if heavy else 0.0,
    )
    return head + "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

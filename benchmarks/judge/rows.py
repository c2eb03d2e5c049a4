"""Write the rows of the judges into benchmarks/results/votes.json, and the tables to print.

RLHF_DATA=FOLDER python -m benchmarks.judge.rows
"""

import subprocess
import sys
from pathlib import Path

import numpy as np

from benchmarks.judge import coverage, pandalm
from benchmarks.paths import RESULTS
from benchmarks.result_rows import add_rows, row_of

SIMULATED = "python -m benchmarks.judge.coverage 10000"
PEOPLE = "python -m benchmarks.judge.pandalm"
# id -> what, tests
TESTS = {
    "judge-openai-protocol": (
        "pairs and scores through the chat protocol: both orders, schema, repair, retries, cost, cache",
        "tests/judge/test_client.py",
    ),
    "judge-key-in-no-output": (
        "the key of an endpoint stands in no cache, log, message or representation",
        "tests/judge/test_client.py -k key_is_sent",
    ),
    "judge-official-client": (
        "the official openai client reads the stand-in server and sends what the judge sends",
        "tests/judge/test_client.py -k official",
    ),
    "judge-served-model": (
        "a real 135M model behind `rlhf serve` as judge and scorer; what cannot be read is counted",
        "tests/judge/test_served.py -m slow",
    ),
    "judge-alpaca-eval-arena-hard": (
        "round trips of AlpacaEval and Arena-Hard files without loss",
        "tests/judge/test_formats.py",
    ),
}


def passed(arguments: str) -> bool:
    """Return whether the tests passed, none of them skipped."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rs"]
    done = subprocess.run([*command, *arguments.split()], capture_output=True, text=True)
    skipped = "skipped" in done.stdout.splitlines()[-1] or "SKIPPED" in done.stdout
    if done.returncode or skipped:
        print(done.stdout[-500:])
    return done.returncode == 0 and not skipped


def coverage_rows(rows: list[dict]) -> list[dict]:
    values = [row["corrected"] for row in rows]
    ratios = []
    for row in rows:
        if row["judge"] == "right in 85 %":
            ratios.append(row["corrected width"] / row["people width"])
    what = (
        "coverage of corrected 95 % win rates with votes on at most half of the prompts, "
        f"{len(rows)} settings"
    )
    width = "mean width of corrected intervals over that of the votes alone, judge right in 85 %"
    return [
        row_of("judge-coverage-least", f"least {what}", min(values), ">= 0.93", SIMULATED),
        row_of("judge-coverage-most", f"greatest {what}", max(values), "<= 0.97", SIMULATED),
        row_of("judge-corrected-width", width, float(np.mean(ratios)), "< 1", SIMULATED),
    ]


def people_rows(results: dict) -> list[dict]:
    rows = []
    for name, found in results.items():
        values = [row["corrected coverage"] for row in found["rows"]]
        what = f"coverage on PandaLM's people, ten pairs of models, half the votes, judge: {name}"
        key = name.split()[0].strip(",")
        rows.append(
            row_of(f"judge-people-{key}-least", f"least {what}", min(values), ">= 0.93", PEOPLE)
        )
        rows.append(
            row_of(f"judge-people-{key}-most", f"greatest {what}", max(values), "<= 0.97", PEOPLE)
        )
    # half of the pairs that it would lose: the bias is half of the people's share of losses
    own = results["likes llama-7b"]["report"]["self_preference"]["difference"]
    what = "lower end of the self-preference found in a judge that has it"
    rows.append(row_of("judge-self-preference", what, own["low"], "> 0", PEOPLE))
    length = results["longer answer"]["report"]["length"]["excess"]
    what = "lower end of the length bias, beyond the people's, of a judge of length alone"
    rows.append(row_of("judge-length-bias", what, length["low"], "> 0", PEOPLE))
    own = results["person 1"]["report"]["length"]["excess"]
    what = "lower end of the same for a person: none is found"
    rows.append(row_of("judge-length-bias-of-a-person", what, own["low"], "<= 0", PEOPLE))
    return rows


def main() -> None:
    simulated = coverage.main(10_000)
    coverage.show(simulated)
    rows = coverage_rows(simulated) + people_rows(pandalm.main(Path("runs/judge")))
    for id, (what, tests) in TESTS.items():
        rows.append(row_of(id, what, passed(tests), "== True", f"pytest {tests}"))
    add_rows(RESULTS / "votes.json", rows)


if __name__ == "__main__":
    main()

"""Every export of a run of the real model, compared with the run: a page and rows of results.

    python -m benchmarks.serving.export_rows runs/compare/real/seed-0/ppo-kl_coef-0.05

What was exported before is measured again from its export.json; GGUF files also run in llama.cpp.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.paths import RESULTS
from benchmarks.result_rows import add_rows, made_with, row_of
from benchmarks.serving.llama_cpp import exports, measured
from rlhf.export.check import PROMPTS
from rlhf.export.run import ExportConfig, export
from rlhf.program import program
from rlhf.startup import silence_libraries
from rlhf.text import markdown_table

PAGE = RESULTS / "2026-11-29-export-real.md"
# name -> form, type of GGUF, what reads it back, largest KL per token in nats
FORMS = {
    "merged": ("merged", "f16", "transformers", 1e-6),
    "vllm": ("vllm", "f16", "PEFT", 1e-6),
    "gguf-f16": ("gguf", "f16", "transformers", 1e-3),
    "gguf-q8_0": ("gguf", "q8_0", "transformers", 1e-2),
}
# the same for the logit by which a run may prefer its own token where another is chosen
GAP = 0.1


def exported(run: Path, name: str) -> dict[str, Any]:
    """Return the facts of an export, which is made where it is missing."""
    file = run / "export" / name / "export.json"
    if file.is_file():
        return json.loads(file.read_text())
    form, kind, _, _ = FORMS[name]
    return export(ExportConfig(run=str(run), to=form, type=kind, check=len(PROMPTS)))


def rows_of(facts: dict[str, dict], llama: dict[str, dict], command: str) -> list[dict[str, Any]]:
    """Return the rows of results: KL to the run, greedy tokens equal."""
    rows = []
    for name, own in facts.items():
        most = FORMS[name][3]
        found = own["check"]
        what = f"{name} of a trained policy on SmolLM2-135M, read by {FORMS[name][2]}, on {found['prompts']} prompts"
        rows.append(
            row_of(
                f"export-{name}-kl",
                f"{what}: KL to the run, nats a token",
                found["kl_per_token"],
                f"<= {most}",
                command,
            )
        )
        if largest_gap(own) is not None:
            rows.append(
                row_of(
                    f"export-{name}-gap",
                    f"{what}: where a greedy token first differs, by how much the run preferred its own, in logits",
                    largest_gap(own),
                    f"<= {GAP}",
                    command,
                )
            )
        least = 1.0 if most <= 1e-3 else 0.95
        rows.append(
            row_of(
                f"export-{name}-tokens",
                f"{what}: share of greedy tokens equal",
                found["tokens_equal"],
                f">= {least}",
                command,
            )
        )
    for name, found in llama.items():
        what = f"{name} in llama.cpp on {found['prompts']} prompts: share of greedy tokens equal"
        rows.append(
            row_of(f"export-{name}-llama.cpp", what, found["tokens_equal"], ">= 0.95", command)
        )
    return rows


def largest_gap(facts: dict[str, Any]) -> float | None:
    """Return the largest logit gap at the first difference of an answer, None where there is none."""
    gaps = [place["logit_gap"] for place in facts["check"]["differing"]]
    # one answer may only be longer than the other
    return max((gap for gap in gaps if gap is not None), default=None)


def page(run: Path, facts: dict[str, dict], llama: dict[str, dict], command: str) -> list[str]:
    """Return the lines of the page."""
    cells = []
    for name, own in facts.items():
        found, size = own["check"], sum(own["files"].values()) / 2**20
        answers = f"{found['answers_equal']} of {found['prompts']}"
        cells.append(
            [
                name,
                f"{size:.1f}",
                FORMS[name][2],
                answers,
                f"{found['tokens_equal']:.1%}",
                f"{found['kl_per_token']:.2g}",
                "–" if largest_gap(own) is None else f"{largest_gap(own):.2g}",
            ]
        )
    for name, found in llama.items():
        answers = f"{found['answers_equal']} of {found['prompts']}"
        cells.append(
            [
                name,
                f"{found['MiB']:.1f}",
                "llama.cpp",
                answers,
                f"{found['tokens_equal']:.1%}",
                "–",
                f"{max(found['logit_gaps']):.2g}" if found["logit_gaps"] else "–",
            ]
        )
    header = [
        "form",
        "MiB",
        "loaded by",
        "answers equal",
        "tokens equal",
        "KL, nats a token",
        "largest logit gap",
    ]
    return [
        "# Exports of a trained policy beside its run",
        "",
        f"`{command}`, a run of `make real`: SmolLM2-135M-Instruct, after SFT and `{run.name}`. Greedy answers to "
        f"{len(PROMPTS)} questions, compared with those of base and adapter in float32. "
        + made_with("transformers", "peft"),
        "",
        *markdown_table(header, cells, right=[1, 3, 4, 5, 6]),
        "",
        "Tokens are compared one by one after the run's own tokens, so that a difference is counted once; answers are "
        "greedy from the question on. The gap is the one by which the run preferred its own token, where an answer "
        "first differs.",
    ]


@program
def main() -> None:
    """Export, measure, and write page and rows."""
    silence_libraries()
    run = Path(sys.argv[1])
    command = f"python -m benchmarks.serving.export_rows {run}"
    facts = {name: exported(run, name) for name in FORMS}
    llama = {file.parent.name: found for file, found in measured(str(run), exports(run))}
    lines = page(run, facts, llama, command)
    PAGE.write_text("\n".join(lines) + "\n", encoding="utf-8")
    add_rows(RESULTS / "real.json", rows_of(facts, llama, command))
    print("\n".join(lines))


if __name__ == "__main__":
    main()

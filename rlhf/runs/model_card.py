"""The model card of a run: README.md in its folder."""

from itertools import chain
from pathlib import Path
from typing import Any

from rlhf.files import write_atomic
from rlhf.runs.tracking import versions
from rlhf.text import markdown_table, reasons_of


def write_card(
    output_dir: str | Path,
    program: str,
    config: dict[str, Any],
    result: dict[str, Any],
    provenance: dict[str, Any],
) -> None:
    """Write README.md: what was trained, from what, on which data, with what result.

    config: the resolved options; result: as in result.json;
    provenance: {data set: {"source": ..., "rows": ..., "fingerprint": ..., ...}}, or {what: one
    line of text}.
    """
    folder = Path(output_dir)
    base = str(config.get("model_name_or_path", "unknown"))
    # decides which code the Hub shows for loading it
    library = "peft" if (folder / "adapter_config.json").exists() else "transformers"
    lines = ["---", f"library_name: {library}"]
    # the Hub refuses a card whose base is a folder
    if base != "unknown" and not Path(base).exists():
        lines.append(f"base_model: {base}")
    lines += ["tags:", "- rlhf", f"- {program}", "---"]

    lines += ["", f"# {folder.resolve().name}: {program} of {Path(base).name}", ""]
    lines.append(
        f"Trained by `launch/{program}.py` from `{base}`, seed {result.get('seed', '?')}. All options are in"
    )
    lines.append(
        "`config.yaml`, the numbers over time in `metrics.jsonl`, the outcome in `result.json`."
    )
    lines += ["", "## Result", "", *_table(["number", "value"], result.get("headline", {}).items())]
    lines += ["", "## Cost", "", *_table(["counter", "value"], result.get("budget", {}).items())]

    lines += ["", "## Data", ""]
    lines += [
        f"- {name}: {text}" for name, text in provenance.items() if not isinstance(text, dict)
    ]
    data_sets = _data_sets(result, provenance)
    facts = list(dict.fromkeys(chain.from_iterable(data_sets.values())))
    rows = []
    for name, data_set in data_sets.items():
        rows.append([name, *(data_set.get(fact, "") for fact in facts)])
    lines += ["", *_table(["data", *facts], rows), "", "Equal fingerprints mean equal rows."]

    # those of the run, which may have been made elsewhere
    installed = result.get("versions", versions())
    known = [f"{package} {version}" for package, version in installed.items() if version]
    lines += ["", "## Versions", "", ", ".join(known)]
    write_atomic(folder / "README.md", "\n".join(lines) + "\n")


def _data_sets(result: dict[str, Any], provenance: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return what is known about each data set: its provenance, row counts and fingerprint."""
    data_sets = {name: dict(facts) for name, facts in provenance.items() if isinstance(facts, dict)}
    for name, counts in result.get("rows", {}).items():
        facts = data_sets.setdefault(name, {})
        facts.update(
            read=counts["read"], used=counts["used"], dropped=reasons_of(counts["dropped"])
        )
    for name, fingerprint in result.get("data", {}).items():
        data_sets.setdefault(name, {}).setdefault("fingerprint", fingerprint)
    return data_sets


def _table(header: list[str], rows: Any) -> list[str]:
    return markdown_table(header, rows) if rows else ["None given."]

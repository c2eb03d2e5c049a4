"""README.md of an exported model: base, method, data, numbers, how to load it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlhf.text import markdown_table


def card(facts: dict[str, Any], config: dict[str, Any], result: dict[str, Any]) -> str:
    """Return the model card; `facts` is export.json, `config` and `result` are the run's, or empty."""
    lines = ["---"]
    # decides which code the Hub shows for loading it
    libraries = {"model.safetensors": "transformers", "adapter_model.safetensors": "peft"}
    lines += [f"library_name: {libraries[name]}" for name in libraries if name in facts["files"]]
    # the Hub refuses a card whose base is a folder
    if not Path(facts["base"]).exists() and not facts["base"].endswith(".gguf"):
        lines.append(f"base_model: {facts['base']}")
    program = result.get("program", "policy")
    lines += ["tags:", "- rlhf", f"- {program}", "---", ""]

    base = Path(facts["base"]).name
    lines += [f"# {facts['name']}: {program} of {base}", ""]
    started = config.get("model_name_or_path")
    origin = f"Trained by `launch/{program}.py` from `{started}`" if started else "A policy"
    lines.append(f"{origin} on the base model `{base}`, exported as {facts['form']}.")
    lines += ["", "```bash", facts["load"], "```"]

    headline = result.get("headline", {})
    if headline:
        lines += ["", "## Result of the run", ""]
        lines += markdown_table(["number", "value"], headline.items())
    data = [*config.get("data", [])]
    rows = [[name, count["used"]] for name, count in result.get("rows", {}).items()]
    if data:
        lines += ["", "## Data", "", f"Trained on: {', '.join(map(str, data))}.", ""]
        lines += markdown_table(["rows", "used"], rows)

    check = facts.get("check")
    if check:
        lines += ["", "## Beside the run", ""]
        lines.append("Greedy answers of this export and of the run (base and adapter):")
        shown = [(name, value) for name, value in check.items() if name != "differing"]
        lines += ["", *markdown_table(["number", "value"], shown)]
    return "\n".join(lines) + "\n"

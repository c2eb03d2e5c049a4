"""`rlhf export RUN --to FORM`: write a trained policy for other programs, and check what was written.

merged: safetensors with the adapter added to the base. gguf: one file for llama.cpp. ollama: that
file and a Modelfile. vllm: the adapter as vLLM serves it beside others on one base.
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rlhf.compare.runs import run_config, run_result
from rlhf.config import option
from rlhf.errors import UserError
from rlhf.files import dumps
from rlhf.runs.tracking import versions
from rlhf.text import markdown_table

# mean KL per token, nats, from which an export computes something else than the run. A wrong order
# of rows gives several nats, float16 and bfloat16 1e-6 to 1e-3, blocks of 8 bits up to 1e-1
MOST_KL = {"merged": 0.05, "f16": 0.01, "q8_0": 0.5, "vllm": 0.001}


@dataclass
class ExportConfig:
    """Write the policy of a run for programs that serve models."""

    run: str = option(help="the run: a folder of SFT, DPO or PPO, or any model or adapter")
    to: Literal["merged", "gguf", "ollama", "vllm"] = option(
        help="merged: whole safetensors; gguf: for llama.cpp; ollama: GGUF and Modelfile; vllm: a LoRA folder"
    )
    out: str | None = option(
        None, "the folder to write; default: RUN/export/TO, GGUF with its type"
    )
    type: Literal["f16", "q8_0"] = option("f16", "of the weights in GGUF: 16 bits, or blocks of 8")
    check: int = option(
        8, "prompts on which it is compared with the run; 0: no check", low=0, high=10
    )
    push_to_hub: str | None = option(
        None,
        "also upload it to this repository of the Hub, USER/NAME; made private where it is missing",
    )

    def validate(self) -> None:
        if self.out is None and not Path(self.run).is_dir():
            raise UserError(
                f"{self.run}: no such folder. A model on the Hub? Say where to write with --out"
            )


def export(config: ExportConfig) -> dict[str, Any]:
    """Write the export, whole or not at all, and return what its export.json says.

    Raises UserError where the folder exists, the model has no such form, or the check fails; what
    was written is then left beside for inspection.
    """
    is_gguf = config.to in ("gguf", "ollama")
    name = f"{config.to}-{config.type}" if is_gguf else config.to
    out = Path(config.out or Path(config.run) / "export" / name)
    if out.exists():
        raise UserError(f"{out}: exists already. Remove it, or choose another --out")
    # torch comes with it
    from rlhf.export.forms import write_form

    # whole or not at all: a half export could be served
    temporary = out.with_name(f"{out.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        facts = write_form(config.to, config.type, config.run, temporary, config.check)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise

    facts["files"] = {file.name: file.stat().st_size for file in sorted(temporary.iterdir())}
    facts["versions"] = versions()
    readme = card(facts, run_config(config.run), run_result(config.run))
    (temporary / "README.md").write_text(readme, encoding="utf-8")
    (temporary / "export.json").write_text(dumps(facts, indent=2) + "\n", encoding="utf-8")
    if "check" in facts:
        check(facts["check"], MOST_KL[config.type if is_gguf else config.to], temporary)
    os.replace(temporary, out)
    print(report(facts, out))
    if config.push_to_hub:
        print(f"pushed: {push(out, config.push_to_hub)}")
    return facts


def check(found: dict[str, Any], most_kl: float, folder: Path) -> None:
    """Raise UserError where the export reads other ids, or gives another distribution, than the run."""
    if not found["same_ids"]:
        raise UserError(f"{folder}: its tokenizer gives other ids than the run's. Not to be used")
    # NaN is not below
    if not found["kl_per_token"] <= most_kl:
        raise UserError(
            f"{folder}: KL to the run is {found['kl_per_token']:.3g} nats a token, above {most_kl}. Not to be used; "
            "this is an error of the export, please report it"
        )


def push(folder: Path, name: str) -> str:
    """Upload an export to a repository of the Hub and return the address of the commit.

    Raises UserError where the Hub cannot be reached or refuses; the export stays.
    """
    from huggingface_hub import HfApi

    hub = HfApi()
    try:
        repository = hub.create_repo(name, private=True, exist_ok=True).repo_id
        return str(hub.upload_folder(repo_id=repository, folder_path=folder).commit_url)
    # of the network, of the Hub, of its names
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{folder} is written, but not pushed to {name} ({reason}). Log in with: hf auth login; then: "
            f"hf upload {name} {folder}"
        ) from None


def report(facts: dict[str, Any], out: Path) -> str:
    """Return what the command prints: files, check, how to load it."""
    size = sum(facts["files"].values()) / 2**20
    lines = [f"{out}: {facts['form']}, {size:.1f} MiB"]
    check = facts.get("check")
    if check:
        lines.append(
            f"beside the run: {check['answers_equal']} of {check['prompts']} greedy answers equal, "
            f"{check['tokens_equal']:.2%} of {check['tokens']} tokens, KL {check['kl_per_token']:.2g} nats a token"
        )
        for place in check["differing"]:
            gap = place["logit_gap"]
            why = "one has ended"
            if gap is not None:
                why = f"the run preferred its own by {gap:.2g} (logits)"
            lines.append(
                f"  prompt {place['prompt']} differs from token {place['token']} on; {why}"
            )
    return "\n".join([*lines, f"in that folder: {facts['load']}"])


def card(facts: dict[str, Any], config: dict[str, Any], result: dict[str, Any]) -> str:
    """Return the model card; `facts` is export.json, `config` and `result` are the run's, or empty."""
    # decides which code the Hub shows for loading it
    libraries = {"model.safetensors": "transformers", "adapter_model.safetensors": "peft"}
    head = [f"library_name: {libraries[name]}" for name in libraries if name in facts["files"]]
    # the Hub refuses a card whose base is a folder
    if not Path(facts["base"]).exists() and not facts["base"].endswith(".gguf"):
        head.append(f"base_model: {facts['base']}")
    program, base = result.get("program", "policy"), Path(facts["base"]).name
    started = config.get("model_name_or_path")
    origin = f"Trained by `launch/{program}.py` from `{started}`" if started else "A policy"
    lines = ["---", *head, "tags:", "- rlhf", f"- {program}", "---", ""]
    lines += [f"# {facts['name']}: {program} of {base}", ""]
    lines += [f"{origin} on the base model `{base}`, exported as {facts['form']}.", ""]
    lines += ["```bash", facts["load"], "```"]

    headline = result.get("headline", {})
    if headline:
        numbers = markdown_table(["number", "value"], headline.items())
        lines += ["", "## Result of the run", "", *numbers]
    data = config.get("data", [])
    if data:
        rows = [[name, count["used"]] for name, count in result.get("rows", {}).items()]
        lines += ["", "## Data", "", f"Trained on: {', '.join(map(str, data))}.", ""]
        lines += markdown_table(["rows", "used"], rows)
    if facts.get("check"):
        shown = [(name, value) for name, value in facts["check"].items() if name != "differing"]
        said = "Greedy answers of this export and of the run (base and adapter):"
        table = markdown_table(["number", "value"], shown)
        lines += ["", "## Beside the run", "", said, "", *table]
    return "\n".join(lines) + "\n"

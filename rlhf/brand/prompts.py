"""`rlhf brand prompts`: prompts from templates, each with the facts that its answer must keep."""

import itertools
import random
import re
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from rlhf.brand.pairs import write_rows
from rlhf.config import SEED, option
from rlhf.errors import UserError, did_you_mean
from rlhf.validation import Spec, validate

PLACEHOLDER = re.compile(r"\{(\w+)\}")


def _as_mapping(value: Any) -> Any:
    # most templates have no metadata of their own
    return {"prompt": value} if isinstance(value, str) else value


class Template(Spec):
    """A prompt with {placeholders}, and metadata that all prompts made from it have."""

    prompt: str = Field(min_length=1)
    metadata: dict[str, Any] = Field({})


class Templates(Spec):
    """Templates, and the values of their placeholders; a value is also a fact in the metadata."""

    prompts: list[Annotated[Template, BeforeValidator(_as_mapping)]] = Field(min_length=1)
    values: dict[str, list[str]] = Field({})


@dataclass(kw_only=True)
class PromptsConfig:
    """Write prompts from templates: every template with every value of its placeholders."""

    templates: dict = option(
        help="{prompts: ['Where is my {item}?', {prompt: ..., metadata: {remedy: trace}}], "
        "values: {item: [kettle, lamp]}}"
    )
    output: str = option(help="the file to write, .jsonl")
    limit: int | None = option(None, "at most so many, drawn by the seed", low=1)
    seed: int = option(0, "of the order, and of the choice where there is a limit", **SEED)


def prompts(config: PromptsConfig) -> list[dict[str, Any]]:
    """Write and return the rows {"prompt", "metadata"}. Raises UserError."""
    rows = fill(config.templates)
    # shuffled, so that a limit takes from every template
    random.Random(config.seed).shuffle(rows)
    rows = rows[: config.limit]
    write_rows(config.output, rows)
    print(f"{config.output}: {len(rows)} prompts")
    return rows


def fill(given: dict[str, Any]) -> list[dict[str, Any]]:
    """Return one row for each template and each choice of values, each prompt once."""
    templates = validate(Templates, given, "templates")
    rows = {}
    for template in templates.prompts:
        # once each, in the order of the text
        names = list(dict.fromkeys(PLACEHOLDER.findall(template.prompt)))
        for name in names:
            if not templates.values.get(name):
                hint = did_you_mean(name, templates.values)
                raise UserError(
                    f"templates: '{template.prompt}' needs values for '{name}' and has none.{hint}"
                )
        for chosen in itertools.product(*(templates.values[name] for name in names)):
            values = dict(zip(names, chosen, strict=True))
            text = PLACEHOLDER.sub(lambda match, own=values: own[match[1]], template.prompt)
            messages = [{"role": "user", "content": text}]
            # two templates may give the same text: the first one's metadata counts
            rows.setdefault(text, {"prompt": messages, "metadata": {**template.metadata, **values}})
    return list(rows.values())

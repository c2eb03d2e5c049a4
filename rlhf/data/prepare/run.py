"""`rlhf data prepare`: from collected rows to a file that can be trained on, with a data card
beside it.

Every step reports its findings and parameters. Nothing is random, so the same input gives the same
file.
"""

import copy
import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from rlhf.config import option
from rlhf.data import export, load, sources
from rlhf.data.annotator_report import annotator_summaries
from rlhf.data.describe import KINDS, guess, summarise
from rlhf.data.prepare import card, steps
from rlhf.data.prepare.pii import REGIONS
from rlhf.data.split import assign
from rlhf.data.votes import Aggregate
from rlhf.errors import UserError


@dataclass
class PrepareConfig:
    """Clean a data set, find what is wrong with it, and write it with a data card. No input file is
    changed.
    """

    source: list[str] = option(
        help="file, preference store (votes.db, votes.db@118) or Hub name, or several"
    )
    output: str = option(
        help="the file to write, .jsonl or .parquet; data_card.md is written beside it"
    )
    kind: Literal["auto", "prompt", "instruction", "preference", "labelled"] = option(
        "auto", "read the rows as this kind of record; auto goes by the columns of the first row"
    )
    form: export.Form = option(
        "rows", "rows: TRL's conversational columns and all others; unpaired (KTO), hh, openai"
    )
    aggregate: Aggregate = option(
        "majority", "how a store's votes become pairs: each, majority or skill"
    )
    against: list[str] = option(
        [], "evaluation files or Hub names: rows that contain their texts are left out"
    )
    personal: Literal["mask", "drop", "keep"] = option(
        "mask", "personal data: mask it as [EMAIL] and so on, drop the row, or only report it"
    )
    phone_regions: list[str] = option(
        list(REGIONS),
        "countries whose national telephone numbers are found; those with + always are",
    )
    near: float = option(
        0.7,
        "similarity (Jaccard, character 4-grams) from which texts are near duplicates; 1: off",
        low=0.3,
        high=1.0,
    )
    leak_ngram: int = option(
        8, "length in words of the n-grams that are looked for in evaluations", low=2
    )
    leak_overlap: float = option(
        0.7,
        "share of an evaluation text's n-grams from which a row counts as contaminated",
        above=0.0,
        high=1.0,
    )
    licence: list[str] = option(
        [], "licence of each source in their order, or one for all; shown in the card"
    )
    examples: int = option(2, "how many findings of each step to show", low=0)

    def validate(self) -> None:
        """Raise UserError on licences that do not match the sources, and on unknown regions."""
        if len(self.licence) not in (0, 1, len(self.source)):
            raise UserError(
                f"option 'licence': found {len(self.licence)}, expected one, or one for each source"
            )
        from phonenumbers import SUPPORTED_REGIONS

        unknown = [region for region in self.phone_regions if region not in SUPPORTED_REGIONS]
        if unknown:
            raise UserError(
                f"option 'phone_regions': found {', '.join(unknown)}, expected countries as two capital letters of ISO "
                "3166, such as US, GB (not UK) or DE"
            )


def prepare(config: PrepareConfig) -> dict[str, Any]:
    """Run all steps, print what they found, write output and card; return the report.

    Raises UserError: nothing to read, an output that is one of the inputs, a form that cannot hold
    the rows, or no row left at the end. Then nothing is written.
    """
    output = export.check_output(config.output, [*config.source, *config.against])
    # before the work: it takes minutes, and a name that is taken would waste them
    card_path = card.card_path(output)

    names = list(map(_at_newest_event, config.source))
    table = load.read_table(names, KINDS.get(config.kind) or guess(names), config.aggregate)
    table.check_usable("skip")
    places = list(map(card.place_without_folder, table.places))
    work = steps.Work(table.records, places, table.own_group, config.examples, config.phone_regions)
    # the steps below remove rows, and the card tells what was read
    origins = card.describe_sources(names, table, config.licence)

    work.steps.append(steps.report_reading(table, config.aggregate))
    steps.clean_texts(work)
    # before anything is masked: the evaluation is not masked either
    if config.against:
        steps.exclude_contaminated(
            work, config.against, config.leak_ngram, config.leak_overlap, config.near
        )
    steps.handle_personal_data(work, config.personal)
    steps.deduplicate(work, config.near)
    steps.join_groups_of_similar_rows(work, config.near)
    card.print_steps(work.steps)
    if not work.records:
        reasons = ", ".join(f"{step.name} {step.dropped}" for step in work.steps if step.dropped)
        raise UserError(f"{', '.join(names)}: no row is left; left out by {reasons}")

    rows = export.rows_of(work.records, config.form)
    report = {
        "output": output.name,
        "rows": len(rows),
        "kind": table.kind.__name__,
        "form": config.form,
        "fingerprint": load.fingerprint(work.records),
        "sources": origins,
        "steps": work.steps,
        "annotators": annotator_summaries(names, work.records),
        "summary": _summary(table, work),
        "options": dataclasses.asdict(config),
    }
    card.print_report(report)
    export.write_rows(rows, output)
    card.write_card(report, card_path)
    print(f"\n{output}: {len(rows)} rows; {card_path} beside it")
    return report


def _at_newest_event(name: str) -> str:
    """Return a store's name with its newest event: later votes change nothing, and the card can
    name the state.
    """
    path, event = sources.split_event(name)
    if event is not None or not sources.is_store(name):
        return name
    from rlhf.data.store import Store

    with Store.open(path, readonly=True) as store:
        return f"{name}@{store.last_event()}"


def _summary(table: load.Table, work: steps.Work) -> dict[str, Any]:
    """Return what is left as `rlhf data show` describes it, without what the card shows elsewhere."""
    # splits are assigned for the summary alone: the output has those that the data gives
    records = list(map(copy.copy, work.records))
    assign(records)
    left = load.Table(
        table.kind, table.sources, records, work.places, work.own_group, schemas=table.schemas
    )
    summary = summarise(left)
    for name in ("form", "bad rows", "warnings", "fingerprint"):
        del summary[name]
    return summary | card.balance(records)

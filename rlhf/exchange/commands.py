"""`rlhf collect import` and `rlhf data export --form argilla | label_studio`."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rlhf.config import option
from rlhf.data import load, sources
from rlhf.data.export import ExportConfig, check_output, write_text
from rlhf.data.records import Preference, one_name
from rlhf.data.store import Store
from rlhf.errors import UserError
from rlhf.exchange import argilla, label_studio
from rlhf.exchange.pairs import (
    JudgedPair,
    add_pairs,
    fault_of,
    pairs_of_preferences,
    pairs_of_view,
    read_users,
)
from rlhf.files import dumps

READERS: dict[str, Callable[..., list[JudgedPair]]] = {
    "argilla": argilla.from_records,
    "label_studio": label_studio.from_tasks,
}


@dataclass
class ImportConfig:
    """Add pairs with votes to a preference store: a file of Argilla or Label Studio, labelled pairs,
    or another store. The same file again adds nothing."""

    source: str = option(
        help="JSON of Argilla or Label Studio, any file of preferences, a store, or a Hub name"
    )
    store: str = option(help="the preference store (SQLite), made if it is missing")
    form: Literal["auto", "argilla", "label_studio", "pairs"] = option(
        "auto", "what the source is; auto goes by the first row"
    )
    users: str | None = option(
        None, "argilla, label_studio: JSON file {name here: id or e-mail address there}"
    )
    answers: list[str] = option(
        [],
        "argilla, label_studio: names of the two fields with the answers, of argilla also of more, which "
        "a ranking orders; default: told by name",
    )
    annotator: str | None = option(
        None,
        "pairs: whose votes the labels of rows without an annotator are; default: the file's name",
    )
    kind: Literal["auto", "person", "model", "rule"] = option(
        "auto", "pairs: what the annotators are; auto: people where a row names one, else a rule"
    )
    on_error: Literal["stop", "skip"] = option(
        "stop", "what to do with rows that are bad, and with pairs of equal or empty answers"
    )

    def validate(self) -> None:
        most = 2 if self.form == "label_studio" else len(self.answers)
        if self.answers and not 2 <= len(self.answers) <= most:
            raise UserError(
                f"'answers' has {len(self.answers)} names, expected two: --answers ONE,TWO"
            )


def import_votes(config: ImportConfig) -> None:
    """Add what the source holds to the store, all of it or nothing, and print how much it was."""
    # before the store is opened: a source that cannot be read leaves it as it is
    pairs = _comparable(_read(config), config.on_error)
    with Store.open(config.store, create=True) as store:
        added = add_pairs(store, pairs)
    people = f" of {', '.join(sorted(added.annotators))}" if added.annotators else ""
    print(
        f"{config.store}: {added.pairs} pairs and {added.votes} votes added{people}, from {len(pairs)} pairs"
    )
    if added.known_votes:
        print(
            f"{added.known_votes} votes left out: their annotators have voted on these pairs already"
        )


def export(config: ExportConfig) -> None:
    """Write a store's pairs and votes for another program, and beside them its project's settings."""
    path = check_output(config.output, config.source, (".json",))
    pairs = []
    for source in config.source:
        pairs += _pairs_of(source, config.on_error)
    users = read_users(config.users)
    # beside the rows goes what sets up a project that can show them
    if config.form == "argilla":
        rows, beside = argilla.to_records(pairs, users), path.with_suffix(".settings.json")
        settings = dumps(argilla.settings(pairs), indent=1) + "\n"
    else:
        rows, beside = label_studio.to_tasks(pairs, users), path.with_suffix(".xml")
        settings = label_studio.labelling(pairs)
    write_text(path, dumps(rows, indent=1) + "\n")
    write_text(beside, settings)
    votes = sum(len(pair.votes) for pair in pairs)
    print(f"{path}: {len(pairs)} pairs with {votes} votes ({config.form}); {beside}: the settings")


def _read(config: ImportConfig) -> list[JudgedPair]:
    form = config.form
    if form == "auto":
        form = _form_of(config.source)
    if form == "pairs":
        return _pairs_of(config.source, config.on_error, config.annotator, config.kind)
    rows = []
    for place, row, problem in sources.rows(config.source):
        if problem is not None:
            raise UserError(f"{place}: {problem}")
        rows.append(row)
    answers = tuple(config.answers) or None
    return READERS[form](rows, config.source, read_users(config.users), answers)


def _comparable(pairs: list[JudgedPair], on_error: Literal["stop", "skip"]) -> list[JudgedPair]:
    kept = []
    for number, pair in enumerate(pairs, 1):
        fault = fault_of(pair)
        if fault is None:
            kept.append(pair)
        elif on_error == "stop":
            raise UserError(f"pair {number}: {fault}. Leave such pairs out with: --on_error skip")
    if len(kept) < len(pairs):
        print(f"skipped {len(pairs) - len(kept)} pairs with equal or empty answers")
    return kept


def _form_of(source: str) -> str:
    if sources.is_store(source):
        return "pairs"
    row = sources.first_rows(source, 1)[0]
    if isinstance(row.get("fields"), dict):
        return "argilla"
    return "label_studio" if isinstance(row.get("data"), dict) else "pairs"


def _pairs_of(
    source: str,
    on_error: Literal["stop", "skip"],
    annotator: str | None = None,
    kind: Any = "auto",
) -> list[JudgedPair]:
    """Return the pairs of a store with all votes, or labelled pairs with a vote each."""
    if sources.is_store(source):
        path, event = sources.split_event(source)
        with Store.open(path, readonly=True) as store:
            return pairs_of_view(store.at(event))
    # a labelled row is a pair with one vote
    table = load.collect(source, Preference)
    table.check_usable(on_error)
    name = one_name(annotator or Path(source.split("@")[0]).name.split(".")[0])
    given = None if kind == "auto" else kind
    return pairs_of_preferences(table.records, table.own_group, name, given)

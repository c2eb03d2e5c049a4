"""`rlhf collect import` and `rlhf data export --form argilla | label_studio`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rlhf.config import option
from rlhf.data import load, sources
from rlhf.data.export import ExportConfig, check_output, write_text
from rlhf.data.records import Preference, one_name
from rlhf.data.store import Store
from rlhf.errors import UserError
from rlhf.exchange import argilla, argilla_rankings, label_studio, label_studio_rankings
from rlhf.exchange.fields import read_users
from rlhf.exchange.pairs import (
    Added,
    JudgedPair,
    add_pairs,
    fault_of,
    pairs_of_preferences,
    pairs_of_view,
)
from rlhf.exchange.rankings import JudgedRanking, add_rankings, rankings_of_view
from rlhf.files import dumps

# of one row: the reader of a ranking, and that of what is left, as pairs
READERS = {
    "argilla": (argilla_rankings.from_record, argilla.from_record),
    "label_studio": (label_studio_rankings.from_task, label_studio.from_task),
}
# writers of pairs and of rankings: of one, and of what sets up a project that can show them, with
# its file's ending
WRITERS = {
    "argilla": (
        (argilla.to_record, argilla.settings, ".settings.json"),
        (argilla_rankings.to_record, argilla_rankings.settings, ".settings.json"),
    ),
    "label_studio": (
        (label_studio.to_task, label_studio.labelling, ".xml"),
        (label_studio_rankings.to_task, label_studio_rankings.labelling, ".xml"),
    ),
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
    pairs, rankings = _read(config)
    pairs = _comparable(pairs, config.on_error, "pair")
    rankings = _comparable(rankings, config.on_error, "ranking")
    with Store.open(config.store, create=True) as store, store.transaction():
        added = Added()
        # first, since they make the pairs that somebody may have voted on by itself
        add_rankings(store, rankings, added)
        add_pairs(store, pairs, added)
    people = f" of {', '.join(sorted(added.annotators))}" if added.annotators else ""
    also = f", {added.rankings} rankings" if rankings else ""
    print(
        f"{config.store}: {added.pairs} pairs{also} and {added.votes} votes added{people}, from {len(pairs)} pairs"
        + (f" and {len(rankings)} rankings" if rankings else "")
    )
    if added.known_votes:
        print(
            f"{added.known_votes} votes left out: their annotators have voted on these pairs already"
        )


def export(config: ExportConfig) -> None:
    """Write a store's pairs and votes for another program, and beside them its project's settings;
    rankings, which need a project of their own, in a file beside.
    """
    path = check_output(config.output, config.source, (".json",))
    pairs, rankings = [], []
    for source in config.source:
        more_pairs, more_rankings = _judged(source, config.on_error)
        pairs += more_pairs
        rankings += more_rankings
    users = read_users(config.users)
    pair_writer, ranking_writer = WRITERS[config.form]
    if pairs or not rankings:
        _write(path, pair_writer, pairs, users, "pairs with {} votes")
    if rankings:
        beside = path.with_suffix(".rankings.json")
        _write(beside, ranking_writer, rankings, users, "rankings with {} orders")


def _write(
    path: Path, writer: tuple[Any, Any, str], judged: list[Any], users: dict[str, str], what: str
) -> None:
    to_row, settings_of, suffix = writer
    settings = settings_of(judged)
    rows = [to_row(one, users) for one in judged]
    write_text(path, dumps(rows, indent=1) + "\n")
    beside = path.with_suffix(suffix)
    write_text(beside, settings if isinstance(settings, str) else dumps(settings, indent=1) + "\n")
    casts = sum(len(one.casts) for one in judged)
    print(f"{path}: {len(judged)} {what.format(casts)}; {beside}: the settings")


def _read(config: ImportConfig) -> tuple[list[JudgedPair], list[JudgedRanking]]:
    form = config.form
    if form == "auto":
        form = _form_of(config.source)
    if form == "pairs":
        return _judged(config.source, config.on_error, config.annotator, config.kind)
    # who the other program's ids are here
    names = {id: name for name, id in read_users(config.users).items()}
    answers = tuple(config.answers) or None
    pairs, rankings = [], []
    for place, row in sources.sound_rows(config.source):
        # anybody may have written the file
        try:
            _read_row(form, row, (place, names, answers), pairs, rankings)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{place}: is not as {form} writes it ({type(error).__name__}: {error})"
            ) from None
    return pairs, rankings


def _read_row(
    form: str,
    row: Any,
    about: tuple[Any, ...],
    pairs: list[JudgedPair],
    rankings: list[JudgedRanking],
) -> None:
    """Add what a row holds to the pairs and rankings."""
    read_ranking, read_pairs = READERS[form]
    ranking, left = read_ranking(row, *about)
    if ranking is not None:
        rankings.append(ranking)
    # no ranking, or one of which some have placed a part
    if left is not None:
        pairs += read_pairs(left, *about)


def _comparable(judged: list[Any], on_error: Literal["stop", "skip"], what: str) -> list[Any]:
    kept = []
    for number, one in enumerate(judged, 1):
        fault = fault_of(one.answers)
        if fault is None:
            kept.append(one)
        elif on_error == "stop":
            raise UserError(
                f"{what} {number}: {fault}. Leave such {what}s out with: --on_error skip"
            )
    if len(kept) < len(judged):
        print(f"skipped {len(judged) - len(kept)} {what}s with equal or empty answers")
    return kept


def _form_of(source: str) -> str:
    if sources.is_store(source):
        return "pairs"
    row = sources.first_rows(source, 1)[0]
    if isinstance(row.get("fields"), dict):
        return "argilla"
    return "label_studio" if isinstance(row.get("data"), dict) else "pairs"


def _judged(
    source: str,
    on_error: Literal["stop", "skip"],
    annotator: str | None = None,
    kind: Any = "auto",
) -> tuple[list[JudgedPair], list[JudgedRanking]]:
    """Return the pairs and rankings of a store with all votes, or labelled pairs with a vote each."""
    if sources.is_store(source):
        path, event = sources.split_event(source)
        with Store.open(path, readonly=True) as store:
            view = store.at(event)
            return pairs_of_view(view), rankings_of_view(view)
    # a labelled row is a pair with one vote
    table = load.read_table(source, Preference)
    table.check_usable(on_error)
    name = one_name(annotator or Path(source.split("@")[0]).name.split(".")[0])
    given = None if kind == "auto" else kind
    return pairs_of_preferences(table.records, table.own_group, name, given), []

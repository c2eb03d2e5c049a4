"""The preference store's tables, its connections, and how a file of an older version becomes one of
this version.

`MIGRATIONS[n]` takes a file of version n to n + 1; a new file runs through all of them, so the path
that old files take is the one that every test takes. The version is stored in the file as `PRAGMA
user_version`.
"""

import contextlib
import sqlite3
import time
from pathlib import Path

from rlhf.errors import UserError, near_file

# how long a writer waits for the others
BUSY_SECONDS = 60.0
# how long to wait for others who set a new file up at the same moment
WAL_SECONDS = 60.0
# "RLHF", so that another program's database is not taken for a store
APPLICATION_ID = 0x524C4846

_EVENT_CHECKS = """
    CHECK (kind IN ('assign', 'release', 'vote', 'undo')),
    CHECK ((kind = 'vote') = (choice IS NOT NULL)),
    CHECK ((kind = 'undo') = (undoes IS NOT NULL)),
    CHECK (choice IS NULL OR choice IN ('a', 'b', 'tie', 'both_bad', 'skip')),
    CHECK ("left" IS NULL OR "left" IN ('a', 'b')),
    CHECK (strength IS NULL OR strength IN (1, 2, 3))"""


def _unchangeable(table: str) -> list[str]:
    return [
        f"CREATE TRIGGER {table}_no_{verb.lower()} BEFORE {verb} ON {table} "
        f"BEGIN SELECT RAISE(ABORT, '{table} are never changed: {verb} refused'); END"
        for verb in ("UPDATE", "DELETE")
    ]


# INSERT OR REPLACE deletes without asking the triggers of DELETE, and an id between others would
# rewrite the past
_ONLY_AT_THE_END = """CREATE TRIGGER events_only_at_the_end BEFORE INSERT ON events
    WHEN (NEW.id > 0 AND NEW.id <= (SELECT coalesce(max(id), 0) FROM events))
        OR EXISTS (SELECT 1 FROM events WHERE request = NEW.request OR undoes = NEW.undoes)
    BEGIN SELECT RAISE(ABORT, 'events are only added at the end, once each'); END"""

_FIRST = [
    """CREATE TABLE prompts (
        id INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, messages TEXT NOT NULL, own_group TEXT,
        default_group TEXT NOT NULL, voice TEXT, metadata TEXT NOT NULL DEFAULT '{}', created TEXT NOT NULL)""",
    """CREATE TABLE responses (
        id INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, prompt INTEGER NOT NULL REFERENCES prompts (id),
        text TEXT NOT NULL, model TEXT, model_fingerprint TEXT, adapter_fingerprint TEXT,
        sampling TEXT NOT NULL DEFAULT '{}', ended INTEGER, created TEXT NOT NULL, UNIQUE (id, prompt))""",
    """CREATE TABLE comparisons (
        id INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, prompt INTEGER NOT NULL, a INTEGER NOT NULL,
        b INTEGER NOT NULL, kind TEXT NOT NULL, expected TEXT, created TEXT NOT NULL,
        FOREIGN KEY (a, prompt) REFERENCES responses (id, prompt),
        FOREIGN KEY (b, prompt) REFERENCES responses (id, prompt),
        CHECK (a < b), CHECK (kind IN ('normal', 'control')),
        CHECK ((kind = 'control') = (expected IS NOT NULL)), CHECK (expected IS NULL OR expected IN ('a', 'b')))""",
    """CREATE TABLE annotators (
        id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, kind TEXT NOT NULL, token_hash TEXT UNIQUE,
        created TEXT NOT NULL, CHECK (kind IN ('person', 'model', 'rule')))""",
    f"""CREATE TABLE events (
        id INTEGER PRIMARY KEY AUTOINCREMENT, comparison INTEGER NOT NULL REFERENCES comparisons (id),
        annotator INTEGER NOT NULL REFERENCES annotators (id), kind TEXT NOT NULL, choice TEXT, "left" TEXT,
        strength INTEGER, reason TEXT, tags TEXT NOT NULL DEFAULT '[]', duration_ms INTEGER,
        undoes INTEGER UNIQUE REFERENCES events (id), request TEXT UNIQUE, created TEXT NOT NULL, {_EVENT_CHECKS})""",
    "CREATE INDEX responses_of_prompt ON responses (prompt)",
    "CREATE INDEX events_of_pair ON events (comparison, annotator)",
    "CREATE INDEX events_of_annotator ON events (annotator, kind)",
    *(
        sql
        for table in ("prompts", "responses", "comparisons", "events")
        for sql in _unchangeable(table)
    ),
    _ONLY_AT_THE_END,
]

_SECOND = [
    "ALTER TABLE prompts ADD COLUMN split TEXT CHECK (split IN ('train', 'validation', 'test'))",
    # what the collection was set up with: overlap, lease of an assignment, ...
    "CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL, changed TEXT NOT NULL)",
]

_THIRD = [
    # who stands behind a name: a person, a program that stands for one, or a judge (model or rule)
    """ALTER TABLE annotators ADD COLUMN source TEXT NOT NULL DEFAULT 'human'
        CHECK (source IN ('human', 'simulated', 'judge'))""",
    "UPDATE annotators SET source = 'judge' WHERE kind <> 'person'",
    "UPDATE annotators SET source = 'simulated' WHERE name LIKE 'sim-%'",
]

_OLD_EVENTS = """id, comparison, annotator, kind, choice, "left", strength, reason, tags, duration_ms,
    undoes, request, created"""
_FOURTH = [
    # whose vote ends a dispute; fixed from the start, so that no past changes
    """ALTER TABLE annotators ADD COLUMN role TEXT NOT NULL DEFAULT 'annotator'
        CHECK (role IN ('annotator', 'adjudicator'))""",
    # Checks cannot be changed in place. exclude, include: of an annotator, so without a comparison.
    # corrected: the response that the annotator wrote; criteria: {name: 1 to 5} as JSON
    """CREATE TABLE events_new (
        id INTEGER PRIMARY KEY AUTOINCREMENT, comparison INTEGER REFERENCES comparisons (id),
        annotator INTEGER NOT NULL REFERENCES annotators (id), kind TEXT NOT NULL, choice TEXT, "left" TEXT,
        strength INTEGER, reason TEXT, tags TEXT NOT NULL DEFAULT '[]', duration_ms INTEGER,
        undoes INTEGER UNIQUE REFERENCES events_new (id), request TEXT UNIQUE, created TEXT NOT NULL,
        corrected INTEGER REFERENCES responses (id), criteria TEXT,
        CHECK (kind IN ('assign', 'release', 'vote', 'undo', 'exclude', 'include')),
        CHECK ((kind IN ('exclude', 'include')) = (comparison IS NULL)),
        CHECK ((kind = 'vote') = (choice IS NOT NULL)),
        CHECK ((kind = 'undo') = (undoes IS NOT NULL)),
        CHECK (choice IS NULL OR choice IN ('a', 'b', 'tie', 'both_bad', 'skip')),
        CHECK ("left" IS NULL OR "left" IN ('a', 'b')),
        CHECK (strength IS NULL OR strength IN (1, 2, 3)),
        CHECK (kind = 'vote' OR (corrected IS NULL AND criteria IS NULL)))""",
    f"INSERT INTO events_new ({_OLD_EVENTS}) SELECT {_OLD_EVENTS} FROM events ORDER BY id",
    "DROP TABLE events",
    "ALTER TABLE events_new RENAME TO events",
    "CREATE INDEX events_of_pair ON events (comparison, annotator)",
    "CREATE INDEX events_of_annotator ON events (annotator, kind)",
    *_unchangeable("events"),
    _ONLY_AT_THE_END,
]

_EVENTS_OF_FOURTH = f"{_OLD_EVENTS}, corrected, criteria"
_FIFTH = [
    # a question with more than two answers, which are ordered; responses: their ids as JSON
    """CREATE TABLE rankings (
        id INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, prompt INTEGER NOT NULL REFERENCES prompts (id),
        responses TEXT NOT NULL, created TEXT NOT NULL)""",
    *_unchangeable("rankings"),
    # whose pairs it is that this is one of
    "ALTER TABLE comparisons ADD COLUMN ranking INTEGER REFERENCES rankings (id)",
    "CREATE INDEX comparisons_of_ranking ON comparisons (ranking)",
    # ranking: asked about instead of a comparison. placed: the order as [[id, id], [id]], equally good
    # ones together, the best first; shown: the ids as they stood on the page; spans: marked passages
    """CREATE TABLE events_new (
        id INTEGER PRIMARY KEY AUTOINCREMENT, comparison INTEGER REFERENCES comparisons (id),
        annotator INTEGER NOT NULL REFERENCES annotators (id), kind TEXT NOT NULL, choice TEXT, "left" TEXT,
        strength INTEGER, reason TEXT, tags TEXT NOT NULL DEFAULT '[]', duration_ms INTEGER,
        undoes INTEGER UNIQUE REFERENCES events_new (id), request TEXT UNIQUE, created TEXT NOT NULL,
        corrected INTEGER REFERENCES responses (id), criteria TEXT,
        ranking INTEGER REFERENCES rankings (id), placed TEXT, shown TEXT, spans TEXT,
        CHECK (kind IN ('assign', 'release', 'vote', 'undo', 'exclude', 'include')),
        CHECK ((kind IN ('exclude', 'include')) = (comparison IS NULL AND ranking IS NULL)),
        CHECK (comparison IS NULL OR ranking IS NULL),
        CHECK ((kind = 'vote') = (choice IS NOT NULL)),
        CHECK ((kind = 'undo') = (undoes IS NOT NULL)),
        CHECK (choice IS NULL OR choice IN ('a', 'b', 'tie', 'both_bad', 'skip', 'rank')),
        CHECK (choice IS NULL OR choice = 'skip' OR (choice = 'rank') = (ranking IS NOT NULL)),
        CHECK (coalesce(choice = 'rank', 0) = (placed IS NOT NULL)),
        CHECK ("left" IS NULL OR "left" IN ('a', 'b')),
        CHECK (strength IS NULL OR strength IN (1, 2, 3)),
        CHECK (ranking IS NOT NULL OR shown IS NULL),
        CHECK (kind = 'vote' OR (corrected IS NULL AND criteria IS NULL AND spans IS NULL)))""",
    f"INSERT INTO events_new ({_EVENTS_OF_FOURTH}) SELECT {_EVENTS_OF_FOURTH} FROM events ORDER BY id",
    "DROP TABLE events",
    "ALTER TABLE events_new RENAME TO events",
    "CREATE INDEX events_of_pair ON events (comparison, annotator)",
    "CREATE INDEX events_of_ranking ON events (ranking, annotator)",
    "CREATE INDEX events_of_annotator ON events (annotator, kind)",
    *_unchangeable("events"),
    _ONLY_AT_THE_END,
]

MIGRATIONS: list[list[str]] = [_FIRST, _SECOND, _THIRD, _FOURTH, _FIFTH]
VERSION = len(MIGRATIONS)


def connect(path: Path, *, create: bool, readonly: bool) -> sqlite3.Connection:
    """Return a connection to the store, which is brought to this version, in memory if `readonly`.

    Raises UserError: no such file (without `create`), not a preference store, or made by a newer
    version.
    """
    _check_path(path, create=create)
    connection = None
    try:
        connection = _open_file(path, readonly=readonly)
        connection.row_factory = sqlite3.Row
        if not readonly:
            prepare(connection, path)
        elif version(connection, path) < VERSION:
            connection = _upgraded_copy(connection, path)
        return connection
    except (sqlite3.Error, UserError) as error:
        # a file that is refused must not stay open
        if connection is not None:
            connection.close()
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: cannot be opened as a preference store ({error})") from None


def _check_path(path: Path, *, create: bool) -> None:
    if not path.exists() and not create:
        raise UserError(f"{path}: no such preference store{near_file(path)}")
    if not path.parent.is_dir():
        raise UserError(f"{path}: its folder {path.parent} does not exist; make it first")
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: is not a file, so it cannot be a preference store")
    if not create and path.stat().st_size == 0:
        raise UserError(f"{path}: is an empty file, not a preference store")


def _open_file(path: Path, *, readonly: bool) -> sqlite3.Connection:
    """Return a connection; one for reading leaves the file as it is, and nothing beside it."""
    if not readonly:
        return sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None)

    # While others have the file open it is read beside them. Otherwise SQLite's own read-only mode
    # would leave its helper files there, and on a disk that cannot be written it must be told that
    # nobody changes the file.
    in_use = Path(f"{path}-wal").exists()
    modes = ("mode=ro",) if in_use else ("mode=rw", "mode=ro&immutable=1")
    for mode in modes:
        uri = f"{path.absolute().as_uri()}?{mode}"
        connection = sqlite3.connect(uri, timeout=BUSY_SECONDS, isolation_level=None, uri=True)
        try:
            connection.execute("PRAGMA query_only = ON")
            connection.execute("SELECT count(*) FROM sqlite_master")
            return connection
        except sqlite3.OperationalError as error:
            connection.close()
            failed = error
    raise failed


def _upgraded_copy(connection: sqlite3.Connection, path: Path) -> sqlite3.Connection:
    """Return the store in memory, brought to this version."""
    copy = sqlite3.connect(":memory:", isolation_level=None)
    copy.row_factory = sqlite3.Row
    with contextlib.closing(connection):
        connection.backup(copy)
    prepare(copy, path)
    return copy


def _write_ahead(db: sqlite3.Connection) -> None:
    """Turn the write-ahead log on. SQLite does not wait here when another process is doing the
    same: we do.
    """
    deadline = time.monotonic() + WAL_SECONDS
    while True:
        try:
            db.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def prepare(db: sqlite3.Connection, path: Path) -> None:
    """Set the connection up, check that the file is a store, and bring it to this version in one
    transaction.

    Raises UserError for another program's file or a newer version; sqlite3.Error if it is no
    database at all.
    """
    db.execute("PRAGMA foreign_keys = ON")
    # before the first write: another program's file is left alone
    found = version(db, path)
    _write_ahead(db)
    db.execute("PRAGMA synchronous = FULL")
    if found == VERSION:
        return
    db.execute("BEGIN IMMEDIATE")
    try:
        # the version is read again: another process may have been first
        for statements in MIGRATIONS[version(db, path) :]:
            for sql in statements:
                db.execute(sql)
        db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        db.execute(f"PRAGMA user_version = {VERSION}")
        db.execute("COMMIT")
    except BaseException:
        db.execute("ROLLBACK")
        raise


def version(db: sqlite3.Connection, path: Path) -> int:
    """Return the file's version. Raises UserError for another program's file or a newer version."""
    found = db.execute("PRAGMA user_version").fetchone()[0]
    # a new file has neither tables nor our mark
    ours = db.execute("PRAGMA application_id").fetchone()[0] == APPLICATION_ID
    if not ours and (found or db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]):
        raise UserError(f"{path}: is an SQLite file, but not a preference store")
    if found > VERSION:
        raise UserError(
            f"{path}: is a preference store of version {found}, and this program knows versions up to {VERSION}. "
            "Use the newer version of this project"
        )
    return found

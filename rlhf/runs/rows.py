"""The data rows that a run reads, and what its result records about them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rlhf.data.conversation import assistant_turns
from rlhf.data.load import fingerprint, load
from rlhf.data.records import Instruction, Preference, Prompt, Record, digest, prompt_group
from rlhf.data.sources import is_path, is_store, split_event
from rlhf.errors import UserError
from rlhf.options.shared import RunConfig
from rlhf.runs.checkpoint import Checkpoint
from rlhf.text import reasons_of

if TYPE_CHECKING:
    from rlhf.ranks.distributed import DistributedContext

# hashes of the first user turns that a run was trained on
TRAINED_ON = "trained_on.txt"
# share of dropped rows from which the message is a warning
WARN_ABOVE = 0.1


class RunData:
    """Reads and encodes rows, and keeps their fingerprints and counts by "kind/split".

    `row_counts` has {"read", "used", "dropped": {reason: count}}, `trained_on` the groups of all
    training rows.
    """

    def __init__(
        self,
        config: RunConfig,
        world: DistributedContext,
        log: Callable[[str], None],
        resumed: Checkpoint | None = None,
    ):
        self.config = config
        self.world = world
        self.log = log
        self.resumed = resumed
        self.fingerprints: dict[str, str] = {}
        self.row_counts: dict[str, dict[str, Any]] = {}
        self.trained_on: set[str] = set()
        # turns of the assistant in the training rows that were read, dropped ones included
        self.assistant_turns = 0
        self._frozen_files: dict[str, Path] = {}

    def rows(
        self,
        kind: type[Record],
        split: Literal["train", "validation"],
        tokenizer: Any,
        sources: list[str] | None = None,
    ) -> list[dict[str, Any]]:
        """Return the encoded rows of one split (see `encode`) without those that are too long.

        What is dropped is counted and logged. Raises UserError where more than `max_dropped` of the
        training rows are dropped, or all of them, or where a resumed run was trained on other rows.
        """
        from rlhf.data.encode import encode

        config = self.config
        where = ", ".join(sources or config.data)
        what = kind.__name__.lower()
        name = f"{what}/{split}"
        is_training = split == "train"

        # rows that cannot be used are found before the split
        unusable = Counter()
        records = self.load(kind, split, sources, unusable)
        if unusable:
            read = unusable.pop("read")
            self._count(f"{what}/every split", where, read, unusable, may_stop=is_training)

        # a prompt has no response yet
        max_response_length = None if kind is Prompt else config.max_response_length
        rows, dropped = encode(
            records,
            tokenizer,
            config.max_prompt_length,
            max_response_length,
            config.on_error,
            getattr(config, "train_on", "last"),
        )
        if kind is Preference and not self._keeps_ties:
            rows = self._without_ties(rows, dropped)
        self._count(name, where, len(records), dropped, may_stop=is_training)

        if is_training and kind is Instruction:
            self.assistant_turns = sum(1 + len(assistant_turns(r.prompt)) for r in records)
        kept = [row["record"] for row in rows]
        self.fingerprints[name] = fingerprint(kept)
        if is_training:
            # by the first user turn, whatever group the data names
            self.trained_on.update(prompt_group(record.prompt) for record in kept)
            self._check_same_rows(name, where)
        return rows

    def load(
        self,
        kind: type[Record],
        split: str | None,
        sources: list[str] | None = None,
        bad: Counter | None = None,
    ) -> list[Any]:
        """Return the records of one split; `bad` gets the number of skipped rows by reason."""

        config = self.config
        return load(
            [self._readable(source, kind) for source in sources or config.data],
            kind,
            split=split,
            half=config.half,
            validation_fraction=config.validation_fraction,
            test_fraction=config.test_fraction,
            limit=config.limit,
            on_error=config.on_error,
            bad=bad,
        )

    @property
    def _keeps_ties(self) -> bool:
        """Return whether the program learns from pairs that have no winner."""
        return getattr(self.config, "ties", "drop") != "drop"

    def _without_ties(self, rows: list[dict[str, Any]], dropped: Counter) -> list[dict[str, Any]]:
        """Return the rows of pairs with a winner; the others are counted in `dropped`."""
        kept = [row for row in rows if row["record"].has_winner]
        if len(kept) < len(rows):
            dropped["a tie: as many votes for one answer as for the other"] += len(rows) - len(kept)
        return kept

    def write_trained_on(self, folder: Path) -> None:
        """Write the groups that `rlhf compare` must not measure on."""
        lines = [f"{group}\n" for group in sorted(self.trained_on)]
        (folder / TRAINED_ON).write_text("".join(lines))

    def _check_same_rows(self, name: str, where: str) -> None:
        before = self.resumed.metadata["data"].get(name) if self.resumed else None
        if before not in (None, self.fingerprints[name]):
            raise UserError(
                f"{where}: not the rows that {self.resumed.folder} was trained on (fingerprint "
                f"{self.fingerprints[name]}, then {before}). Restore the data, choose another --output_dir, or start "
                "over with --overwrite_output_dir true"
            )

    def _count(self, name: str, where: str, read: int, dropped: Counter, *, may_stop: bool) -> None:
        """Record and log how many rows were dropped and why. Raise UserError where they are too
        many.
        """
        count = dropped.total()
        self.row_counts[name] = {"read": read, "used": read - count, "dropped": dict(dropped)}
        if not count:
            return

        # told in full: a silent drop would look like less data
        what, split = name.split("/")
        found = (
            f"{where}: {count} of {read} {what} rows of {split} are dropped ({reasons_of(dropped)})"
        )
        if may_stop and count == read:
            raise UserError(
                f"{found}. Nothing is left to train on: raise the limits, or correct the rows"
            )
        if may_stop and count > self.config.max_dropped * read:
            raise UserError(
                f"{found}, more than max_dropped {self.config.max_dropped:g}. Raise the limits, correct the rows, or "
                "allow it with: --max_dropped 1"
            )
        level = "WARNING: " if count > WARN_ABOVE * read else ""
        self.log(f"{level}{found}")

    def _readable(self, source: str, kind: type[Record]) -> str:
        """Return what to read for `source`: for a preference store, its frozen file of pairs.

        Prompts of a store are those of its pairs, so that PPO trains on the prompts that DPO trains
        on; a store without votes gives all its prompts. Raises UserError for a file inside
        output_dir.
        """
        from rlhf.data.freeze import frozen

        folder = Path(self.config.output_dir).resolve()
        if is_path(source) and Path(source).expanduser().resolve().is_relative_to(folder):
            raise UserError(
                f"{source}: is inside output_dir, whose files belong to the run. Move the data elsewhere"
            )
        if not is_store(source):
            return source

        if source not in self._frozen_files:
            self._frozen_files[source] = self._freeze(source)
        file = self._frozen_files[source]
        has_pairs = bool(frozen(file)["rows"])
        return str(file) if has_pairs or kind is not Prompt else source

    def _freeze(self, source: str) -> Path:
        """Write the pairs of a store as it is now, or at its event (votes.db@118), to
        output_dir/data/.

        Later votes change nothing: the main rank writes the file once, all ranks read it, and so
        does a resumed run.
        """
        from rlhf.data.freeze import freeze

        path, event = split_event(source)
        place = str(Path(path).resolve()) if event is None else f"{Path(path).resolve()}@{event}"
        # stores in two folders may have the same name
        file = (
            Path(self.config.output_dir) / "data" / f"{Path(path).stem}-{digest(place)[:6]}.jsonl"
        )

        def write() -> None:
            is_kept = self.resumed is not None and file.is_file()
            if self.world.is_main and not is_kept:
                freeze(path, file, event, self.config.aggregate, keep_ties=self._keeps_ties)

        self.world.raise_on_all_ranks(write)
        return file

"""Sources to one mixture: held out, ordered, encoded, and each row's fate counted."""

import itertools
import logging
import math
import random
from collections import Counter
from dataclasses import dataclass
from typing import Any

from accelerate import PartialState

from hfsft.data.audit import (
    NOT_BAD,
    audit_console,
    bad_rows,
    print_audit,
    too_many_bad_rows,
    write_audit,
)
from hfsft.data.encoded import Prepared
from hfsft.data.order import Origins, RunOrder, choose_held_out, copies, packing_order, run_order
from hfsft.data.packing import PackedConversations
from hfsft.data.rows import Row, check_source, refuse_duplicates
from hfsft.data.sources import SOURCE_COLUMN
from hfsft.errors import DataError
from hfsft.recipe.schema import Stage
from hfsft.run.disk import writing_to

CHUNK = 2048  # examples of the run's order that are encoded, and cached, together


# they log an error before they raise it, and it is told then
logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)


@dataclass(frozen=True)
class Mixture:
    """A stage's data, and what became of every row of its sources."""

    # a dataset; sft's is a `RunOrder`; of a stream, an endless one; None where nothing is left
    train: Any
    held_out: Any  # a dataset, each row with its `source`; None where the stage validates nothing
    audit: dict[str, Any]  # as `audit.write_audit` takes it
    rejected: list[dict[str, Any]]  # source, row, reason
    origins: "Origins | None" = None  # of the conversations in `train`


def settle(mixture: Mixture, stage: Stage) -> Mixture:
    """Write a mixture's audit and print its table.

    Raises:
        DataError: where `on_bad_rows` refuses its rows, or none is left to train on.
    """
    if PartialState().is_main_process:
        with writing_to(stage.folder):
            write_audit(stage.folder, mixture.audit, mixture.rejected)
        if not stage.quiet:
            print_audit(stage.name, mixture.audit, audit_console())
    sources = mixture.audit["sources"]
    for source in sources if any(source["kept"] for source in sources) else ():
        if _refuses(stage, source):
            first = next(
                entry
                for entry in mixture.rejected
                if entry["source"] == source["source"]
                and entry["reason"] in source["refused"].keys() - set(NOT_BAD)
            )
            raise DataError(
                f"{source['source']}: {bad_rows(source):,} of {source['read']:,} rows are bad, the "
                f"first is row {first['row']} ({first['reason']})\n  Each is in "
                f"{stage.folder / 'rejected.jsonl'}; to train on the rest: --on_bad_rows skip"
            )
    require_rows(mixture, stage)
    return mixture


def _refuses(stage: Stage, audit: dict[str, Any]) -> bool:
    """Whether `on_bad_rows` refuses a source."""
    if stage.on_bad_rows == "error":
        return bad_rows(audit) > 0
    return stage.on_bad_rows is None and too_many_bad_rows(audit)


def require_rows(mixture: Mixture, stage: Stage) -> None:
    """Check that a mixture has rows to train on.

    Raises:
        DataError: if all were refused; it names the first.
    """
    if mixture.train is None:
        nothing = f"{stage.name}: no row is left to train on"
        if not mixture.rejected:
            raise DataError(f"{nothing}; `weight` leaves none of so few")
        first = mixture.rejected[0]
        raise DataError(
            f"{nothing}; all were refused, the first is row {first['row']} of {first['source']} "
            f"({first['reason']})"
        )


# --- conversations ---


def mix_conversations(stage: Stage, tokenizer: Any, refuse: bool = False) -> Mixture:
    """Load, check and mix a stage's conversations, and encode those that its run uses.

    Every row is read and checked. What is held out, and any exact copy of it in any source, is
    trained on nowhere; `repeat` and `weight` copy after that. Of sft with `max_steps` only the
    rows that the run's order comes to are encoded, and those held out; those that cannot be
    trained on are passed over (`on_too_long: error` sees a long one only then). With
    `num_train_epochs`, of mid, or where `on_too_long` is split (a row is several conversations),
    every row is encoded.

    Args:
        stage: names the sources and how many conversations to hold out.
        tokenizer: as `load_tokenizer` returns it.
        refuse: encode nothing where `on_bad_rows` refuses the rows of a source.

    Returns:
        Of sft a `RunOrder`, of mid an epoch's conversations in the order of their sources; with
        `train` None where none is left, or they are refused.

    Raises:
        DataError: if a source cannot be read, or what is held out leaves nothing to train on.
    """
    with PartialState().main_process_first():
        sources = [check_source(source, stage) for source in stage.data]
        refuse_duplicates(sources, stage)
        kept = [(index, row) for index, source in enumerate(sources) for row in source.kept]
        prepared = Prepared(stage, tokenizer, sources)
        audits = map(prepared.audit, range(len(sources)))
        if not kept or (refuse and any(_refuses(stage, audit) for audit in audits)):
            return Mixture(None, None, *_audit(prepared, [], [], []))
        if prepared.whole:
            prepared.encode(kept)
        held_rows = _hold_out(stage, kept, prepared)
        held = [item for index, row in held_rows for item in prepared.items[index][row]]
        prepared.hold_out(held)
        held_digests = {sources[index].digests[row] for index, row in held_rows}
        epoch = [
            (index, row)
            for index, source in enumerate(sources)
            for row in copies(
                [row for row in source.kept if source.digests[row] not in held_digests],
                source.source,
                stage.seed,
            )
        ]
        if not epoch and held:
            raise DataError(
                f"{stage.name}: held_out: {stage.held_out} leaves no conversation to train on"
            )
        if stage.name == "sft":
            places = _run_places(stage, epoch, prepared)
        else:
            places = [item for row in epoch for item in prepared.conversations(row)]
    audit, rejected = _audit(prepared, epoch, places, held_rows)
    if not places:
        return Mixture(None, None, audit, rejected)
    encoded = prepared.dataset()
    names = [str(source) for source in stage.data]
    origins = Origins(names, prepared.source_of, prepared.numbers, places)
    if stage.name == "sft":
        train = RunOrder(encoded, places, audit["train"])
        train.origins = origins
    else:
        train = encoded.select(places)
    held_out = None
    if stage.validates:
        names = [str(stage.data[prepared.source_of[item]]) for item in held]
        held_out = encoded.select(held).add_column(SOURCE_COLUMN, names)
    return Mixture(train, held_out, audit, rejected, origins)


def _audit(
    prepared: Prepared, epoch: list[Row], places: list[int], held_rows: list[Row]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What became of the rows of every source and the sizes of it all; and the refused rows."""
    stage = prepared.stage
    epoch_of: Counter[int] = Counter()
    for row in epoch:
        epoch_of[row[0]] += prepared.count(row)
    used = Counter(prepared.source_of[item] for item in places)
    held_of = Counter(index for index, row in held_rows for _ in prepared.items[index][row])
    held_digests = {prepared.sources[index].digests[row] for index, row in held_rows}
    audits = []
    for index, source in enumerate(prepared.sources):
        same = sum(source.digests[row] in held_digests for row in source.kept)
        own = sum(its_source == index for its_source, _ in held_rows)
        audits.append(
            prepared.audit(index)
            | {
                "held_out": held_of[index],
                "copies_of_held_out": same - own,
                "copies": source.source.copies,
                "train": epoch_of[index],
                "used": used[index],
            }
        )
    sizes = {"train": epoch_of.total(), "used": len(places), "held_out": held_of.total()}
    if stage.name == "sft":
        sizes |= {"different": len(set(places)), "examples_per_step": stage.examples_per_step}
    rejected = [entry for source in prepared.sources for entry in source.rejected()]
    return {"sources": audits, **sizes}, rejected


def _hold_out(stage: Stage, kept: list[Row], prepared: Prepared) -> list[Row]:
    """Choose and encode what a stage holds out; another takes the place of one that is refused."""
    first: dict[str, Row] = {}  # of each different content
    for index, row in kept:
        first.setdefault(prepared.sources[index].digests[row], (index, row))
    wanted = sorted(choose_held_out(stage, sorted(first)))
    spare = sorted(first.keys() - set(wanted))
    random.Random(f"{stage.seed}:held_out:more").shuffle(spare)
    count, held = len(wanted), []
    while wanted:
        rows = [first[digest] for digest in wanted]
        prepared.encode(rows)
        held += [(index, row) for index, row in rows if prepared.items[index][row]]
        lacking = count - len(held)
        wanted, spare = spare[:lacking], spare[lacking:]
    return sorted(held)


def _run_places(stage: Stage, epoch: list[Row], prepared: Prepared) -> list[int]:
    """The conversation of each example of the whole run, in order."""
    if stage.max_steps is not None:
        total = stage.max_steps * stage.examples_per_step
    else:
        count = sum(len(prepared.conversations(row)) for row in epoch)
        steps = math.ceil(count * stage.trainer["num_train_epochs"] / stage.examples_per_step)
        total = max(1, steps) * stage.examples_per_step
    if stage.on_too_long == "split":
        items = [item for row in epoch for item in prepared.conversations(row)]
        return list(itertools.islice(run_order(items, stage.seed), total))
    places: list[int] = []
    order, looked_at = run_order(epoch, stage.seed), 0
    while len(places) < total and (places or looked_at < len(epoch)):
        rows = list(itertools.islice(order, min(CHUNK, total - len(places))))
        prepared.encode(rows)
        places += [item for row in rows for item in prepared.conversations(row)]
        looked_at += len(rows)
    return places


def load_conversations(stage: Stage, tokenizer: Any) -> tuple[Any, Any]:
    """Mix a stage's conversations, write and print their audit; errors as `mix_conversations`.

    Returns:
        What to train on (sft: a `RunOrder`), and a dataset of what is held out, or None.
    """
    mixture = settle(mix_conversations(stage, tokenizer, refuse=True), stage)
    return mixture.train, mixture.held_out


def load_packed_conversations(stage: Stage, tokenizer: Any) -> tuple[Any, Any]:
    """Mid's data: whole conversations in rows of `max_length`, each attending to itself alone.

    Args and errors as `load_conversations`.

    Returns:
        Rows to train on, and conversations held out (None if the stage validates nothing).
    """
    mixture = settle(mix_conversations(stage, tokenizer, refuse=True), stage)
    order = packing_order(len(mixture.train), stage.seed)
    train = PackedConversations(mixture.train, stage.max_length, order)
    train.origins = mixture.origins
    return train, mixture.held_out

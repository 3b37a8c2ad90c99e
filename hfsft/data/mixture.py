"""A stage's sources mixed into one set of examples: held out, ordered, encoded, and audited."""

import itertools
import logging
import math
import random
from collections import Counter
from dataclasses import dataclass
from typing import Any

import datasets
from accelerate import PartialState

from hfsft.data.audit import (
    audit_console,
    bad_rows,
    is_bad,
    print_audit,
    too_many_bad_rows,
    write_audit,
)
from hfsft.data.encoded import EncodedConversations
from hfsft.data.order import Origins, RunOrder, choose_held_out, copies, packing_order, run_order
from hfsft.data.packing import PackedConversations
from hfsft.data.replay import general_rows, replayed
from hfsft.data.rows import Row, check_source, count_duplicates
from hfsft.data.sources import SOURCE_COLUMN
from hfsft.errors import DataError
from hfsft.recipe.schema import Stage
from hfsft.run.disk import writing_to

CHUNK = 2048  # examples of the run's order that are encoded, and cached, together

# datasets logs an error before it raises it, and the error is reported once it is raised
logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)


@dataclass(frozen=True)
class Mixture:
    """A stage's data, and what became of every row of its sources."""

    # a dataset; of sft a `RunOrder`, of a stream a `TextStream`; None where no row is left
    train: Any
    held_out: Any  # a dataset, each row with its `source`; None where the stage does not validate
    audit: dict[str, Any]  # as `audit.write_audit` takes it
    rejected: list[dict[str, Any]]  # source, row, reason
    origins: Origins | None = None  # of the conversations in `train`


# --- what a stage calls ---


def load_conversations(stage: Stage, tokenizer: Any) -> tuple[Any, Any]:
    """Mix a stage's conversations, and write and print their audit.

    Args:
        stage: as `mix_conversations` takes it.
        tokenizer: as `load_tokenizer` returns it.

    Returns:
        The training set (of sft a `RunOrder`), and the held-out set or None.

    Raises:
        DataError: as `mix_conversations` and `accept_mixture`.
    """
    mixture = accept_mixture(mix_conversations(stage, tokenizer, refuse=True), stage)
    return mixture.train, mixture.held_out


def load_packed_conversations(stage: Stage, tokenizer: Any) -> tuple[Any, Any]:
    """Mix mid's conversations and pack them into rows of `max_length`, none of them split.

    Args and errors as `load_conversations`.

    Returns:
        Rows to train on, and held-out conversations or None.
    """
    mixture = accept_mixture(mix_conversations(stage, tokenizer, refuse=True), stage)
    order = packing_order(len(mixture.train), stage.seed)
    train = PackedConversations(mixture.train, stage.max_length, order)
    train.origins = mixture.origins
    return train, mixture.held_out


# --- accepting a mixture ---


def accept_mixture(mixture: Mixture, stage: Stage) -> Mixture:
    """Write a mixture's audit, check that the stage accepts its rows, and print the audit.

    Returns:
        The mixture itself.

    Raises:
        DataError: if `on_bad_rows` refuses its rows, or none is left to train on.
    """
    is_main = PartialState().is_main_process
    if is_main:
        with writing_to(stage.folder):
            write_audit(stage.folder, mixture.audit, mixture.rejected)
    reason = refusal(mixture, stage)
    if reason is not None:
        raise DataError(
            f"{reason}\n  All are listed in {stage.folder / 'rejected.jsonl'}; to train on the "
            "rest: --on_bad_rows skip"
        )
    require_rows(mixture, stage)
    if is_main and not stage.quiet:
        print_audit(stage.name, mixture.audit, audit_console())
    return mixture


def refusal(mixture: Mixture, stage: Stage) -> str | None:
    """Why `on_bad_rows` refuses a mixture, with the first bad row; None if it does not."""
    sources = mixture.audit["sources"]
    for source in sources if any(source["kept"] for source in sources) else ():
        if _refuses(stage, source):
            first = next(
                entry
                for entry in mixture.rejected
                if entry["source"] == source["source"]
                and entry["reason"] in source["refused"]
                and is_bad(entry["reason"])
            )
            return (
                f"{source['source']}: {bad_rows(source):,} of {source['read']:,} rows are bad, the "
                f"first is row {first['row']} ({first['reason']})"
            )
    return None


def _refuses(stage: Stage, audit: dict[str, Any]) -> bool:
    """Whether `on_bad_rows` refuses a source."""
    if stage.on_bad_rows == "error":
        return bad_rows(audit) > 0
    return stage.on_bad_rows is None and too_many_bad_rows(audit)


def require_rows(mixture: Mixture, stage: Stage) -> None:
    """Check that a mixture has rows to train on.

    Raises:
        DataError: if it has none; it names the first refused row.
    """
    if mixture.train is None:
        nothing = f"{stage.name}: no row is left to train on"
        if not mixture.rejected:
            raise DataError(f"{nothing}; `weight` is too small for so few rows")
        first = mixture.rejected[0]
        raise DataError(
            f"{nothing}; all were refused, the first is row {first['row']} of {first['source']} "
            f"({first['reason']})"
        )


# --- mixing ---


def mix_conversations(stage: Stage, tokenizer: Any, refuse: bool = False) -> Mixture:
    """Load, check and mix a stage's conversations, and encode those that its run uses.

    Every row is read and checked. Held-out conversations, and exact copies of them in any source,
    are never trained on; `repeat` and `weight` apply to what remains. With `max_steps`, sft encodes
    the held-out rows and those that the run's order reaches; rows that cannot be trained on are
    excluded, so `on_too_long: error` only sees the ones reached. Every row is encoded with
    `num_train_epochs`, in mid, and with `on_too_long: split`, where a row is several conversations.

    Args:
        stage: names the sources and the number of conversations to hold out.
        tokenizer: as `load_tokenizer` returns it.
        refuse: encode nothing if `on_bad_rows` refuses the rows of a source.

    Returns:
        Of sft a `RunOrder`, of mid one epoch's conversations in the order of their sources; with
        `train` None if no row is left, or rows are refused.

    Raises:
        DataError: if a source cannot be read, or holding out leaves nothing to train on.
    """
    with PartialState().main_process_first():
        sources = [check_source(source, stage) for source in stage.sources]
        own, general = sources[: len(stage.data)], []
        if stage.replay:
            general = [(len(own), row) for row in general_rows(sources[-1], stage)]
        count_duplicates(sources, stage)
        rows = [(index, row) for index, source in enumerate(own) for row in source.kept]
        encoded = EncodedConversations(stage, tokenizer, sources)
        audits = map(encoded.audit, range(len(sources)))
        if not rows or (refuse and any(_refuses(stage, audit) for audit in audits)):
            return Mixture(None, None, *_audit(encoded, [], [], []))
        if encoded.all_rows:
            encoded.encode(rows)
        held_rows = _hold_out(encoded, rows)
        encoded.encode(general)
        apart = held_rows + general
        encoded.hold_out([item for index, row in apart for item in encoded.items[index][row]])
        epoch = _epoch(encoded, apart)
        if not epoch and held_rows:
            raise DataError(
                f"{stage.name}: held_out: {stage.held_out} leaves no conversation to train on"
            )
        if encoded.all_rows:
            encoded.encode(epoch)  # what is replayed
        if stage.name == "sft":
            examples = _run_examples(encoded, epoch)
        else:
            examples = [item for row in epoch for item in encoded.conversations(row)]
    audit, rejected = _audit(encoded, epoch, examples, apart)
    if not examples:
        return Mixture(None, None, audit, rejected)
    conversations = encoded.dataset()
    names = [str(source) for source in stage.sources]
    origins = Origins(names, encoded.source_of, encoded.row_of, examples)
    if stage.name == "sft":
        train = RunOrder(conversations, examples, audit["train"])
        train.origins = origins
    else:
        train = conversations.select(examples)
    held_out = _held_out_set(encoded, conversations, held_rows) if stage.validates else None
    return Mixture(train, held_out, audit, rejected, origins)


def _hold_out(encoded: EncodedConversations, rows: list[Row]) -> list[Row]:
    """Choose and encode the rows to hold out; refused ones are replaced by others."""
    stage = encoded.stage
    first: dict[str, Row] = {}  # of each distinct content
    for index, row in rows:
        first.setdefault(encoded.sources[index].digests[row], (index, row))
    wanted = sorted(choose_held_out(stage, sorted(first)))
    spare = sorted(first.keys() - set(wanted))
    random.Random(f"{stage.seed}:held_out:more").shuffle(spare)
    count, held = len(wanted), []
    while wanted:
        candidates = [first[digest] for digest in wanted]
        encoded.encode(candidates)
        held += [(index, row) for index, row in candidates if encoded.items[index][row]]
        missing = count - len(held)
        wanted, spare = spare[:missing], spare[missing:]
    return sorted(held)


def _epoch(encoded: EncodedConversations, held_rows: list[Row]) -> list[Row]:
    """The rows of one epoch: copies and replayed rows included, held-out content excluded."""
    held_digests = {encoded.sources[index].digests[row] for index, row in held_rows}
    stage, epoch = encoded.stage, []
    for index, source in enumerate(encoded.sources):
        rows = [(index, row) for row in source.kept if source.digests[row] not in held_digests]
        if source.source is stage.replay:
            epoch += replayed(rows, len(epoch), stage)
        else:
            epoch += copies(rows, source.source, stage.seed)
    return epoch


def _run_examples(encoded: EncodedConversations, epoch: list[Row]) -> list[int]:
    """The conversation of each example of the entire run, in order."""
    stage = encoded.stage
    if stage.max_steps is not None:
        total = stage.max_steps * stage.examples_per_step
    else:
        count = sum(len(encoded.conversations(row)) for row in epoch)
        steps = math.ceil(count * stage.trainer["num_train_epochs"] / stage.examples_per_step)
        total = max(1, steps) * stage.examples_per_step
    if stage.on_too_long == "split":
        items = [item for row in epoch for item in encoded.conversations(row)]
        return list(itertools.islice(run_order(items, stage.seed), total))
    examples: list[int] = []
    order, reached = run_order(epoch, stage.seed), 0
    # after one epoch without an example there is none
    while len(examples) < total and (examples or reached < len(epoch)):
        rows = list(itertools.islice(order, min(CHUNK, total - len(examples))))
        encoded.encode(rows)
        examples += [item for row in rows for item in encoded.conversations(row)]
        reached += len(rows)
    return examples


def _held_out_set(
    encoded: EncodedConversations, conversations: datasets.Dataset, held_rows: list[Row]
) -> datasets.Dataset:
    """The held-out conversations, each with its source's name."""
    held = [(index, item) for index, row in held_rows for item in encoded.items[index][row]]
    names = [str(encoded.sources[index].source) for index, _ in held]
    return conversations.select([item for _, item in held]).add_column(SOURCE_COLUMN, names)


def _audit(
    encoded: EncodedConversations, epoch: list[Row], examples: list[int], held_rows: list[Row]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What became of the rows of every source, the sizes of the sets, and the refused rows."""
    stage = encoded.stage
    epoch_of: Counter[int] = Counter()
    for row in epoch:
        epoch_of[row[0]] += encoded.count(row)
    used = Counter(encoded.source_of[item] for item in examples)
    held_of = Counter(index for index, row in held_rows for _ in encoded.items[index][row])
    held_digests = {encoded.sources[index].digests[row] for index, row in held_rows}
    audits = []
    for index, source in enumerate(encoded.sources):
        same = sum(source.digests[row] in held_digests for row in source.kept)
        own = sum(its_source == index for its_source, _ in held_rows)
        audits.append(
            encoded.audit(index)
            | {
                "held_out": held_of[index],
                "copies_of_held_out": same - own,
                "copies": source.source.copies,
                "train": epoch_of[index],
                "used": used[index],
            }
        )
    sizes = {"train": epoch_of.total(), "used": len(examples), "held_out": held_of.total()}
    if stage.name == "sft":
        sizes |= {"different": len(set(examples)), "examples_per_step": stage.examples_per_step}
    rejected = [entry for source in encoded.sources for entry in source.rejected()]
    return {"sources": audits, **sizes}, rejected

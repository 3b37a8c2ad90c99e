"""A run's report: training, losses, evaluation, sample answers, cost, data, how to reproduce it."""

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hfsft.data.audit import what_is_missing
from hfsft.errors import HfsftError
from hfsft.hub.bounds import without_tokens
from hfsft.noise import Z95
from hfsft.report.markdown import code, fenced, plain, table, write_page
from hfsft.run.results import (
    MALFORMED,
    accuracies,
    forgetting,
    malformed,
    read_run,
    validated_sources,
)

GIB = 2**30


NOTHING = "-"


WIDTH = 92  # characters of a sample answer's lines


# what may be missing from a stage's results → whether it is
GAPS: dict[str, Callable[[dict[str, Any]], bool]] = {
    "not finished; the figures are those of its log so far": lambda stage: not _is_done(stage),
    "not validated: the loss on unseen data is unknown": lambda stage: not stage["validation"],
    "no advice on how long to train": lambda stage: stage["validation"] and not stage["advice"],
    "no data.json: the rows were not counted": lambda stage: not stage["audit"],
    "its data was streamed and not counted": lambda stage: (
        (stage["audit"] or {}).get("sources") == []
    ),
    "not evaluated; run `hfsft eval`": lambda stage: _is_done(stage) and not stage["evaluation"],
    "no sample answers": lambda stage: not stage["samples"],
    "no plan to compare its memory with": lambda stage: not stage["record"].get("plan"),
    "energy was not measured": lambda stage: stage["reached"]["energy_joules"] is None,
}


def write_report(folder: Path, as_html: bool = False) -> tuple[dict[str, Any], Path]:
    """Write the `report.md` of a run, finished or not, with its pictures.

    Args:
        folder: the run's.
        as_html: write `report.html` as well, one file with embedded pictures.

    Returns:
        The figures, as `read_run` returns them, and the file to open.

    Raises:
        HfsftError: if it is not a run, or the files cannot be written.
    """
    run = read_run(folder)
    from hfsft.report.pictures import draw  # matplotlib takes a second

    try:
        drawn = draw(run, folder / "report")
        text = report_text(run, {name: path.relative_to(folder) for name, path in drawn.items()})
        return run, write_page(folder / "report.md", text, as_html)
    except OSError as error:
        raise HfsftError(f"the report of {folder} cannot be written: {error.strerror}") from None
    except MALFORMED as error:
        raise malformed(folder, error) from error


def report_text(run: dict[str, Any], pictures: dict[str, Path]) -> str:
    """The report as Markdown.

    Args:
        run: as `read_run` returns it.
        pictures: name → path relative to the report.
    """
    started = {name: stage for name, stage in run["stages"].items() if stage}
    sections = {
        "Stages": _stages(run),
        "Missing from this report": _missing(run),
        "Loss": _losses(started),
        "Forgetting": _forgetting(started),
        "Evaluation": _evaluation(started),
        "Sample answers": _answers(started),
        "Cost": _cost(started),
        "Data": _data(started),
        "Environment": _environment(started),
        "To reproduce it": _reproduction(run, started),
    }
    shown = {"Loss": "loss", "Evaluation": "evaluation", "Cost": "speed", "Data": "data"}
    blocks = [f"# {plain(Path(run['run']).absolute().name)}", summary_text(run)]
    for title, body in sections.items():
        if body:
            blocks.append(f"## {title}")
            if (picture := pictures.get(shown.get(title, ""))) is not None:
                blocks.append(f"![{title}]({picture.as_posix()})")
            blocks.append(body)
    return without_tokens("\n\n".join(blocks) + "\n")


def _is_done(stage: dict[str, Any]) -> bool:
    return stage["record"]["status"] == "finished"


# --- the lines at the top ---


def summary_text(run: dict[str, Any]) -> str:
    """What was trained and for how long, the results, what was forgotten, and what to do next."""
    started = {name: stage for name, stage in run["stages"].items() if stage}
    first, last = next(iter(started.values())), list(started.values())[-1]
    lines = {"Trained": _trained(started, first, last), "Results": _results(started)}
    if measured := _measured(started):
        shown = [f"{name}, {forgetting(changes)}" for name, changes in measured.items()]
        lines["Forgetting"] = f"loss on general data, in nats per token: {'; '.join(shown)}."
    lines["Next"] = _next(run, started)
    return "\n".join(f"- **{label}:** {line}" for label, line in lines.items())


def _trained(started: dict[str, Any], first: dict[str, Any], last: dict[str, Any]) -> str:
    lineage = first["record"]["lineage"]
    start = f"from {plain(lineage['model'])}" if lineage["model"] else "from random weights"
    stages = ", ".join(
        f"{name} ({_steps(stage)} steps, {stage['reached']['tokens']:,} tokens)"
        for name, stage in started.items()
    )
    seconds = sum(stage["reached"]["seconds"] for stage in started.values())
    record = last["record"]
    return (
        f"a language model of {record['parameters']:,} parameters, {start}, in {stages}; "
        f"{duration(seconds)} of training on {plain(record['device'])}."
    )


def _results(started: dict[str, Any]) -> str:
    parts = []
    for name, stage in started.items():
        reached = stage["reached"]
        before, after = reached["eval_loss_before"], reached["eval_loss"]
        if after is not None:
            parts.append(f"{name} {_number(before)} → {_number(after)}")
    text = "no loss on held-out data was measured after training."
    if parts:
        text = f"loss on held-out data, in nats per token: {', '.join(parts)}."
    graded = [(name, accuracies(stage)) for name, stage in started.items()]
    graded = [(name, tasks) for name, tasks in graded if tasks]
    if graded:
        name, tasks = graded[-1]
        shown = ", ".join(
            f"{plain(task)} {score['accuracy']:.0%}" for task, score in list(tasks.items())[:5]
        )
        text += f" Accuracy after {name}: {shown}."
    return text


def _next(run: dict[str, Any], started: dict[str, Any]) -> str:
    last, stage = list(started.items())[-1]
    names = list(run["stages"])
    # a skipped stage before the last one started is not due, such as base when only sft was run
    for name in (*started, *names[names.index(last) + 1 :]):
        due = run["stages"][name]
        if due is None:
            return f"{name} has not started; run {code(command_of(run, None))}."
        status, again = due["record"]["status"], code(command_of(run, due))
        if status == "running":
            return f"{name} is running, or was killed; if no process trains it, {again} resumes it."
        if status != "finished":
            why = "failed" if status == "failed" else "was interrupted"
            at = f"{due['reached']['steps']:,}"
            return f"{name} {why} at step {at}; {again} resumes from its last checkpoint."
    model = f"{run['run']}/{last}"
    text = f"chat with it: {code(f'hfsft chat {model}')}"
    if not stage["evaluation"]:
        text += f", evaluate it: {code(f'hfsft eval {model}')}"
    if stage["advice"]:
        text += f". Advice on {last}: {_advice(stage)}"
    return text + "."


def _advice(stage: dict[str, Any]) -> str:
    return plain(stage["advice"][-1]["advice"]["says"].rstrip("."))


def command_of(run: dict[str, Any], stage: dict[str, Any] | None) -> str:
    """The command line that trained a stage, or if unknown, one that does the same."""
    return (stage and stage["record"].get("command")) or f"hfsft run {run['run']}/recipe.yaml"


# --- the sections ---


def _facts(stages: dict[str, Any], facts: dict[str, Callable[[dict[str, Any]], str]]) -> str:
    """A table with a row for each fact and a column for each stage."""
    rows = [
        [fact, *(plain(show(stage)) if stage else "not started" for stage in stages.values())]
        for fact, show in facts.items()
    ]
    return table(["", *stages], rows)


def _stages(run: dict[str, Any]) -> str:
    facts = {
        "status": lambda stage: (
            stage["record"]["status"]
            + (" at a plateau" if stage["record"].get("stopped_at") else "")
        ),
        "starts from": lambda stage: stage["record"]["lineage"]["model"] or "random weights",
        "steps": _steps,
        "conversations or rows per step": lambda stage: f"{stage['record']['examples_per_step']:,}",
        "tokens": lambda stage: f"{stage['reached']['tokens']:,}",
        "parameters": lambda stage: f"{stage['record']['parameters']:,}",
        "trained parameters": lambda stage: f"{stage['record']['trained_parameters']:,}",
    }
    return _facts(run["stages"], facts) + (
        "\n\nbase learns language from raw text, mid the format of conversations, sft how an "
        "assistant answers."
    )


def _missing(run: dict[str, Any]) -> str:
    found = {
        gap: [name for name, stage in run["stages"].items() if stage and is_so(stage)]
        for gap, is_so in GAPS.items()
    }
    found["not started"] = [name for name, stage in run["stages"].items() if stage is None]
    lines = [f"- {', '.join(names)}: {gap}." for gap, names in found.items() if names]
    return "\n".join(lines + ([] if run["recipe_text"] else ["- recipe.yaml."]))


def _losses(started: dict[str, Any]) -> str:
    rows = []
    for name, stage in started.items():
        if not stage["validation"]:
            continue
        first = stage["validation"][0]
        last = stage["validation"][-1] if len(stage["validation"]) > 1 else {}
        error, accuracy = last.get("eval_loss_error"), last.get("eval_mean_token_accuracy")
        rows.append(
            [
                f"{name}, all",
                _number(first["eval_loss"]),
                _number(last.get("eval_loss")) + (f" ± {Z95 * error:.3f}" if error else ""),
                _number(last.get("eval_bits_per_byte")),
                NOTHING if accuracy is None else f"{accuracy:.1%}",
            ]
        )
        for source in validated_sources(stage):
            values = [_number(line.get(f"eval_{source}_loss")) for line in (first, last)]
            rows.append([f"{name}, {plain(source)}", *values, NOTHING, NOTHING])
    blocks = [
        "Loss is the mean cross-entropy per trained token, in nats: lower is better, and 0.1 less "
        "means 1.1 times the probability of the right tokens. Validation is on held-out data; ± "
        "and bars are 95% intervals over the held-out examples."
    ]
    if rows:
        header = ["held-out data", "before", "after", "bits per byte", "top-1 accuracy"]
        blocks.append(table(header, rows))
    for name, stage in started.items():
        loss = stage["reached"]["train_loss"]
        line = f"{name}: training loss {_number(loss)} in the last logged steps."
        if stage["advice"]:
            line += f" Advice: {_advice(stage)}."
        blocks.append(line)
    return "\n\n".join(blocks)


def _measured(started: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The stages whose general loss was measured, and how it moved."""
    return {name: stage["general"] for name, stage in started.items() if stage["general"]}


def _forgetting(started: dict[str, Any]) -> str:
    measured = _measured(started)
    if not measured:
        return ""
    rows = [
        [
            f"{name}, {general}",
            _number(one["before"]),
            _number(one["after"]),
            f"{one['change']:+.3f} ({one['low']:+.3f} to {one['high']:+.3f})",
        ]
        for name, changes in measured.items()
        for general, one in changes.items()
    ]
    return "\n\n".join(
        [
            "Loss on general data that the stage holds out: conversations of its `replay`, and "
            "text. A change above 0 is forgetting; its 95% interval is over documents, each "
            "compared with itself.",
            table(["general data", "before", "after", "change"], rows),
            *(f"{name}: {forgetting(changes)}." for name, changes in measured.items()),
        ]
    )


def _evaluation(started: dict[str, Any]) -> str:
    found = {name: stage["evaluation"] for name, stage in started.items() if stage["evaluation"]}
    if not found:
        return ""
    names = list(dict.fromkeys(task for one in found.values() for task in one["tasks"]))
    rows = []
    for task in names:
        scores = [found[name]["tasks"].get(task) if name in found else None for name in started]
        known = next(score for score in scores if score)
        chance = f"{known['chance']:.0%}" if "accuracy" in known else NOTHING
        rows.append([plain(task), f"{known['rows']:,}", chance, *map(_score, scores)])
    mean = [found[name].get("mean_centred") if name in found else None for name in started]
    shown = [NOTHING if value is None else f"{value:.3f}" for value in mean]
    rows.append(["mean centred accuracy", NOTHING, NOTHING, *shown])
    header = ["task", "rows", "chance", *(name.upper() for name in started)]
    seconds = sum(one["seconds"] for one in found.values())
    seeds = ", ".join(str(seed) for seed in dict.fromkeys(one["seed"] for one in found.values()))
    return "\n\n".join(
        [
            table(header, rows),
            "Accuracy with 95% intervals; for loss tasks nats per token. Centred accuracy is 0 at "
            "chance and 1 at best. Stages whose intervals overlap may differ by chance alone; "
            "held_out is each stage's own data. Rows were drawn with seed "
            f"{seeds}; the evaluation took {duration(seconds)}.",
        ]
    )


def _score(score: dict[str, Any] | None) -> str:
    if score is None:
        return NOTHING
    if "accuracy" in score:
        return f"{score['accuracy']:.0%} ({score['low']:.0%} to {score['high']:.0%})"
    error = f" ± {Z95 * score['error']:.3f}" if score.get("error") else ""
    return f"{score['loss']:.3f}{error}"


def _answers(started: dict[str, Any]) -> str:
    prompts = dict.fromkeys(
        sample["prompt"] for stage in started.values() for sample in stage["samples"]
    )
    blocks = []
    for prompt in prompts:
        lines = [_indented("prompt", prompt)]
        for name, stage in started.items():
            given = [sample for sample in stage["samples"] if sample["prompt"] == prompt]
            for sample in given[:1] + given[1:][-1:]:
                lines.append(_indented(f"{name}, step {sample['step']:,}", sample["answer"]))
        blocks.append(fenced("\n".join(lines)))
    if blocks:
        blocks.insert(
            0, "Answers to the recipe's sample prompts at the start and the end of each stage."
        )
    return "\n\n".join(blocks)


def _indented(label: str, text: str) -> str:
    """A label and a text whose further lines are indented, so that none looks like a label."""
    text = text.strip() or "(nothing)"
    lines = [part for line in text.split("\n") for part in textwrap.wrap(line, WIDTH) or [""]]
    return f"{label + ':':<18}" + f"\n{'':18}".join(lines)


def _cost(started: dict[str, Any]) -> str:
    def share(stage: dict[str, Any]) -> str:
        reached = stage["reached"]
        seconds = reached["eval_seconds"] + reached["sample_seconds"]
        return f"{seconds / reached['seconds']:.1%}" if seconds else NOTHING

    def planned(stage: dict[str, Any]) -> str:
        plan = stage["record"].get("plan")
        return _amount(plan and plan["peak"], "GiB", GIB, 2)

    facts = {
        "time": lambda stage: duration(stage["reached"]["seconds"]),
        "share of validation and samples": share,
        "throughput": lambda stage: _amount(stage["reached"]["tokens_per_second"], "tokens/s"),
        "peak memory": lambda stage: _amount(stage["reached"]["peak_memory_bytes"], "GiB", GIB, 2),
        "planned memory": planned,
        "memory measured": lambda stage: stage["record"].get("peak_memory_of") or NOTHING,
        "energy": lambda stage: _amount(stage["reached"]["energy_joules"], "Wh", 3600, 1),
    }
    return _facts(started, facts) + (
        "\n\nTime is from the first step to the end of the last validation, without loading. "
        "Throughput is the median over the intervals between log lines, without validation."
    )


def _data(started: dict[str, Any]) -> str:
    blocks = []
    for name, stage in started.items():
        audit = stage["audit"]
        if not audit or not audit["sources"]:
            continue
        unit = "characters" if "characters" in audit["sources"][0] else "tokens"
        header = [f"{name}: source", "rows read", "kept", "rejected", "held out", "used", unit]
        header += ["trained on", "median", "95% up to", "longest", "truncated or split"]
        rows = [_source_row(source, unit) for source in audit["sources"]]
        blocks.append(table(header, rows))
        missing = [
            f"- {plain(source['source'])}: {plain(line)}"
            for source in audit["sources"]
            for line in what_is_missing(source)
        ]
        blocks += ["\n".join(missing)] if missing else []
    if blocks:
        blocks.append("Lengths are those of prepared rows.")
    return "\n\n".join(blocks)


def _source_row(source: dict[str, Any], unit: str) -> list[str]:
    lengths = source["length_percentiles"]
    trained = source["trained_tokens"] / source[unit] if source[unit] else 0
    return [
        plain(source["source"]),
        f"{source['read']:,}",
        f"{source['kept']:,}",
        f"{sum(source['refused'].values()):,}",
        f"{source.get('held_out', 0):,}",
        f"{source.get('used', source.get('train', 0)):,}",
        f"{source[unit]:,}",
        "all" if unit == "characters" else f"{trained:.0%}",
        *(f"{lengths[at]:,}" if at in lengths else NOTHING for at in ("50", "95", "100")),
        f"{source['truncated'] + source['split']:,}",
    ]


def _environment(started: dict[str, Any]) -> str:
    libraries = dict.fromkeys(
        key for stage in started.values() for key in stage["record"]["versions"]
    )
    facts = {
        "started": lambda stage: stage["record"]["started"],
        "device": lambda stage: stage["record"]["device"],
        "processes": lambda stage: str(stage["record"]["processes"]),
        "precision": lambda stage: stage["record"]["precision"],
    }
    for name in libraries:
        facts[name] = lambda stage, name=name: stage["record"]["versions"].get(name, NOTHING)
    return _facts(started, facts)


def _reproduction(run: dict[str, Any], started: dict[str, Any]) -> str:
    known = all(stage["record"].get("command") for stage in started.values())
    commands = dict.fromkeys(command_of(run, stage) for stage in started.values())
    blocks = [
        "The commands, in order:"
        if known
        else "Not every command was recorded; `hfsft run` does the same:",
        fenced("\n".join(commands), "sh"),
    ]
    if run["recipe_text"]:
        blocks += [
            "The recipe as run, with every default (`recipe.yaml`):",
            fenced(run["recipe_text"], "yaml"),
        ]
    return "\n\n".join(blocks)


# --- numbers as text ---


def duration(seconds: float) -> str:
    """A duration in its one or two largest units."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _steps(stage: dict[str, Any]) -> str:
    return f"{stage['reached']['steps']:,} of {stage['record']['max_steps']:,}"


def _number(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.3f}"


def _amount(value: float | None, unit: str, size: int = 1, digits: int = 0) -> str:
    return NOTHING if value is None else f"{value / size:,.{digits}f} {unit}"

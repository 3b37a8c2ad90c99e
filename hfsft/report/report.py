"""A run's report: what was trained from what, what came out, what it took, and how to repeat it."""

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hfsft.errors import HfsftError
from hfsft.hub.client import without_tokens
from hfsft.noise import Z95
from hfsft.report.markdown import code, fenced, plain, table, write_page
from hfsft.run.results import accuracies, read_run, validated_sources

GIB = 2**30


NOTHING = "-"


WIDTH = 92  # of a sample answer's lines


# what a stage may lack
GAPS: dict[str, Callable[[dict[str, Any]], bool]] = {
    "not finished; the figures are as far as its log goes": lambda stage: not _is_done(stage),
    "not validated: the loss on unseen data is unknown": lambda stage: not stage["validation"],
    "no advice on how long to train": lambda stage: stage["validation"] and not stage["advice"],
    "no data.json: the rows were not counted": lambda stage: not stage["audit"],
    "its data streamed and was not counted": lambda stage: (
        (stage["audit"] or {}).get("sources") == []
    ),
    "not evaluated; `hfsft eval` does it": lambda stage: (
        _is_done(stage) and not stage["evaluation"]
    ),
    "no sample answers": lambda stage: not stage["samples"],
    "no plan to hold its memory against": lambda stage: not stage["record"].get("plan"),
    "energy was not measured": lambda stage: stage["reached"]["energy_joules"] is None,
}


def write_report(folder: Path, as_html: bool = False) -> tuple[dict[str, Any], Path]:
    """Write a run's `report.md` with its pictures; the run may be at any point.

    Args:
        folder: of the run.
        as_html: leave `report.html` as well, one file with the pictures inside.

    Returns:
        The numbers, as `read_run` returns them, and the file to open.

    Raises:
        HfsftError: if it is no run, or the files cannot be written.
    """
    run = read_run(folder)
    from hfsft.report.pictures import draw  # matplotlib takes a second

    try:
        drawn = draw(run, folder / "report")
        text = report_text(run, {name: path.relative_to(folder) for name, path in drawn.items()})
        return run, write_page(folder / "report.md", text, as_html)
    except OSError as error:
        raise HfsftError(f"the report of {folder} cannot be written: {error.strerror}") from None


def report_text(run: dict[str, Any], pictures: dict[str, Path]) -> str:
    """The report as Markdown.

    Args:
        run: as `read_run` returns it.
        pictures: name → path from the report's folder.
    """
    begun = {name: stage for name, stage in run["stages"].items() if stage}
    sections = {
        "Stages": _stages(run),
        "Missing from this report": _missing(run),
        "Loss": _losses(begun),
        "Evaluation": _evaluation(begun),
        "Sample answers": _answers(begun),
        "Cost": _cost(begun),
        "Data": _data(begun),
        "Environment": _environment(begun),
        "To repeat it": _repetition(run, begun),
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


# --- the three lines at the top ---


def summary_text(run: dict[str, Any]) -> str:
    """What was trained from what and how long, what came out, and what to do next: three lines."""
    begun = {name: stage for name, stage in run["stages"].items() if stage}
    first, last = next(iter(begun.values())), list(begun.values())[-1]
    lines = {"Trained": _trained(begun, first, last), "Came out": _came_out(begun)}
    lines["Next"] = _next(run, begun)
    return "\n".join(f"- **{label}:** {line}" for label, line in lines.items())


def _trained(begun: dict[str, Any], first: dict[str, Any], last: dict[str, Any]) -> str:
    lineage = first["record"]["lineage"]
    start = f"from {plain(lineage['model'])}" if lineage["model"] else "from random weights"
    stages = ", ".join(
        f"{name} ({_steps(stage)} steps, {stage['reached']['tokens']:,} tokens)"
        for name, stage in begun.items()
    )
    seconds = sum(stage["reached"]["seconds"] for stage in begun.values())
    record = last["record"]
    return (
        f"a language model of {record['parameters']:,} parameters, {start}, in {stages}; "
        f"{duration(seconds)} of training on {plain(record['device'])}."
    )


def _came_out(begun: dict[str, Any]) -> str:
    parts = []
    for name, stage in begun.items():
        reached = stage["reached"]
        before, after = reached["eval_loss_before"], reached["eval_loss"]
        if after is not None:
            parts.append(f"{name} {_number(before)} → {_number(after)}")
    said = "no loss on held-out data was measured after training."
    if parts:
        said = f"loss on held-out data, in nats a token: {', '.join(parts)}."
    graded = [(name, accuracies(stage)) for name, stage in begun.items()]
    graded = [(name, tasks) for name, tasks in graded if tasks]
    if graded:
        name, tasks = graded[-1]
        shown = ", ".join(
            f"{plain(task)} {score['accuracy']:.0%}" for task, score in list(tasks.items())[:5]
        )
        said += f" Right answers after {name}: {shown}."
    return said


def _next(run: dict[str, Any], begun: dict[str, Any]) -> str:
    last, stage = list(begun.items())[-1]
    names = list(run["stages"])
    # a stage that was passed over, as where only sft was wanted, is not due
    for name in (*begun, *names[names.index(last) + 1 :]):
        due = run["stages"][name]
        if due is None:
            return f"{name} has not begun; {code(command_of(run, None))} goes on with it."
        status, again = due["record"]["status"], code(command_of(run, due))
        if status == "running":
            return f"{name} is running, or was killed; if no process trains it, {again} goes on."
        if status != "finished":
            why = "failed" if status == "failed" else "was interrupted"
            at = f"{due['reached']['steps']:,}"
            return f"{name} {why} at step {at}; {again} goes on from its last checkpoint."
    model = f"{run['run']}/{last}"
    said = f"talk to it with {code(f'hfsft chat {model}')}"
    if not stage["evaluation"]:
        said += f", measure it with {code(f'hfsft eval {model}')}"
    if stage["advice"]:
        said += f". Advice on {last}: {_advice(stage)}"
    return said + "."


def _advice(stage: dict[str, Any]) -> str:
    return plain(stage["advice"][-1]["advice"]["says"].rstrip("."))


def command_of(run: dict[str, Any], stage: dict[str, Any] | None) -> str:
    """The command line of a stage, or where that is not known, one that does the same."""
    return (stage and stage["record"].get("command")) or f"hfsft run {run['run']}/recipe.yaml"


# --- the sections ---


def _facts(stages: dict[str, Any], facts: dict[str, Callable[[dict[str, Any]], str]]) -> str:
    """A table with a row for each fact and a column for each stage."""
    rows = [
        [fact, *(plain(show(stage)) if stage else "not begun" for stage in stages.values())]
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
        "conversations or rows a step": lambda stage: f"{stage['record']['examples_per_step']:,}",
        "tokens": lambda stage: f"{stage['reached']['tokens']:,}",
        "parameters": lambda stage: f"{stage['record']['parameters']:,}",
        "of them trained": lambda stage: f"{stage['record']['trained_parameters']:,}",
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
    found["not begun"] = [name for name, stage in run["stages"].items() if stage is None]
    lines = [f"- {', '.join(names)}: {gap}." for gap, names in found.items() if names]
    return "\n".join(lines + ([] if run["recipe_text"] else ["- recipe.yaml."]))


def _losses(begun: dict[str, Any]) -> str:
    rows = []
    for name, stage in begun.items():
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
    said = [
        "Loss is the mean negative log-likelihood of a token that is trained on, in nats: lower is "
        "better, and 0.1 less means that right tokens get 1.1 times the probability. Validation is "
        "on held-out data; ± and bars are 95% intervals over the held-out examples."
    ]
    if rows:
        header = ["held-out data", "before", "after", "bits a byte", "next token guessed"]
        said.append(table(header, rows))
    for name, stage in begun.items():
        loss = stage["reached"]["train_loss"]
        ends = f"{name}: training loss {_number(loss)} in the last logged steps."
        if stage["advice"]:
            ends += f" Advice: {_advice(stage)}."
        said.append(ends)
    return "\n\n".join(said)


def _evaluation(begun: dict[str, Any]) -> str:
    found = {name: stage["evaluation"] for name, stage in begun.items() if stage["evaluation"]}
    if not found:
        return ""
    names = list(dict.fromkeys(task for one in found.values() for task in one["tasks"]))
    rows = []
    for task in names:
        scores = [found[name]["tasks"].get(task) if name in found else None for name in begun]
        known = next(score for score in scores if score)
        chance = f"{known['chance']:.0%}" if "accuracy" in known else NOTHING
        rows.append([plain(task), f"{known['rows']:,}", chance, *map(_score, scores)])
    mean = [found[name].get("mean_centred") if name in found else None for name in begun]
    shown = [NOTHING if value is None else f"{value:.3f}" for value in mean]
    rows.append(["mean above chance, 0 to 1", NOTHING, NOTHING, *shown])
    header = ["task", "rows", "chance", *(name.upper() for name in begun)]
    seconds = sum(one["seconds"] for one in found.values())
    seeds = ", ".join(str(seed) for seed in dict.fromkeys(one["seed"] for one in found.values()))
    return "\n\n".join(
        [
            table(header, rows),
            "Right answers, with 95% intervals; of loss tasks nats a token. Stages whose intervals "
            "overlap may differ by luck alone; held_out is each stage's own data. Rows were drawn "
            f"with seed {seeds}; the evaluation took {duration(seconds)}.",
        ]
    )


def _score(score: dict[str, Any] | None) -> str:
    if score is None:
        return NOTHING
    if "accuracy" in score:
        return f"{score['accuracy']:.0%} ({score['low']:.0%} to {score['high']:.0%})"
    error = f" ± {Z95 * score['error']:.3f}" if score.get("error") else ""
    return f"{score['loss']:.3f}{error}"


def _answers(begun: dict[str, Any]) -> str:
    prompts = dict.fromkeys(
        sample["prompt"] for stage in begun.values() for sample in stage["samples"]
    )
    blocks = []
    for prompt in prompts:
        lines = [_indented("prompt", prompt)]
        for name, stage in begun.items():
            given = [sample for sample in stage["samples"] if sample["prompt"] == prompt]
            for sample in given[:1] + given[1:][-1:]:
                lines.append(_indented(f"{name}, step {sample['step']:,}", sample["answer"]))
        blocks.append(fenced("\n".join(lines)))
    if blocks:
        blocks.insert(
            0, "What the model said to the recipe's prompts when a stage began and ended."
        )
    return "\n\n".join(blocks)


def _indented(label: str, text: str) -> str:
    """A label and a text whose every further line is indented: it cannot pass for a label."""
    text = text.strip() or "(nothing)"
    lines = [part for line in text.split("\n") for part in textwrap.wrap(line, WIDTH) or [""]]
    return f"{label + ':':<18}" + f"\n{'':18}".join(lines)


def _cost(begun: dict[str, Any]) -> str:
    def share(stage: dict[str, Any]) -> str:
        reached = stage["reached"]
        aside = reached["eval_seconds"] + reached["sample_seconds"]
        return f"{aside / reached['seconds']:.1%}" if aside else NOTHING

    def planned(stage: dict[str, Any]) -> str:
        plan = stage["record"].get("plan")
        return _amount(plan and plan["peak"], "GiB", GIB, 2)

    facts = {
        "time": lambda stage: duration(stage["reached"]["seconds"]),
        "of it validation and samples": share,
        "speed": lambda stage: _amount(stage["reached"]["tokens_per_second"], "tokens/s"),
        "peak memory": lambda stage: _amount(stage["reached"]["peak_memory_bytes"], "GiB", GIB, 2),
        "planned": planned,
        "memory is of": lambda stage: stage["record"].get("peak_memory_of") or NOTHING,
        "energy": lambda stage: _amount(stage["reached"]["energy_joules"], "Wh", 3600, 1),
    }
    return _facts(begun, facts) + (
        "\n\nTime is from the first step to the end of the last validation, without loading. Speed "
        "is the median of the intervals between log lines, and leaves both out."
    )


def _data(begun: dict[str, Any]) -> str:
    blocks = []
    for name, stage in begun.items():
        audit = stage["audit"]
        if not audit or not audit["sources"]:
            continue
        unit = "characters" if "characters" in audit["sources"][0] else "tokens"
        header = [f"{name}: source", "rows read", "kept", "refused", "held out", "used", unit]
        header += ["trained on", "median", "95% up to", "longest", "cut or split"]
        rows = [_source_row(source, unit) for source in audit["sources"]]
        blocks.append(table(header, rows))
        reasons = [
            f"{plain(source['source'])}: {count:,} refused, {plain(reason)}"
            for source in audit["sources"]
            for reason, count in source["refused"].items()
        ]
        blocks += ["\n".join(f"- {reason}" for reason in reasons)] if reasons else []
    if blocks:
        blocks.append("Lengths are those of rows that were prepared.")
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


def _environment(begun: dict[str, Any]) -> str:
    libraries = dict.fromkeys(
        key for stage in begun.values() for key in stage["record"]["versions"]
    )
    facts = {
        "begun": lambda stage: stage["record"]["started"],
        "device": lambda stage: stage["record"]["device"],
        "processes": lambda stage: str(stage["record"]["processes"]),
        "precision": lambda stage: stage["record"]["precision"],
    }
    for name in libraries:
        facts[name] = lambda stage, name=name: stage["record"]["versions"].get(name, NOTHING)
    return _facts(begun, facts)


def _repetition(run: dict[str, Any], begun: dict[str, Any]) -> str:
    known = all(stage["record"].get("command") for stage in begun.values())
    commands = dict.fromkeys(command_of(run, stage) for stage in begun.values())
    blocks = [
        "The commands as they were given, in order:"
        if known
        else "Not every command was recorded; `hfsft run` does the same:",
        fenced("\n".join(commands), "sh"),
    ]
    if run["recipe_text"]:
        blocks += [
            "The recipe with every default, as it was run (`recipe.yaml`):",
            fenced(run["recipe_text"], "yaml"),
        ]
    return "\n\n".join(blocks)


# --- words for numbers ---


def duration(seconds: float) -> str:
    """Seconds in the two largest units that say something."""
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

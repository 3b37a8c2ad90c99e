"""A run's pictures: white background, colour-blind safe, legible at 800 pixels and in print."""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from hfsft.noise import Z95
from hfsft.run.results import accuracies, speeds_of, validated_sources

# the palette of Okabe and Ito (2008), distinguishable with any colour blindness; dashes and markers
# distinguish the curves in greyscale print too
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)))


MARKS = ("o", "s", "^", "D", "v", "P")


MAX_SOURCES = 5  # curves of single sources in one panel


GIB = 2**30


INTEGER = StrMethodFormatter("{x:,.0f}")


SETTINGS = {
    "font.size": 10,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "legend.fontsize": 9,
    "legend.framealpha": 0.9,
    "text.parse_math": False,  # a dollar sign in a file name is not a formula
}


def draw(run: dict[str, Any], folder: Path) -> dict[str, Path]:
    """Draw every picture that the run has data for.

    Args:
        run: as `results.read_run` returns it.
        folder: where the pictures go.

    Returns:
        Name → file: `loss`, `speed`, `data`, `evaluation`.
    """
    stages = {name: stage for name, stage in run["stages"].items() if stage}
    logged = {
        name: stage for name, stage in stages.items() if stage["training"] or stage["validation"]
    }
    audited = {name: stage for name, stage in stages.items() if _sources(stage)}
    graded = {name: stage for name, stage in stages.items() if accuracies(stage)}
    drawn = {}
    for name, shown, picture in (
        ("loss", logged, _draw_losses),
        ("speed", logged, _draw_speed),
        ("data", audited, _draw_data),
        ("evaluation", graded, _draw_evaluation),
    ):
        if shown:
            drawn[name] = _save(lambda: picture(shown), folder / f"{name}.png")  # noqa: B023
    return drawn


def draw_both(runs: Sequence[dict[str, Any]], labels: Sequence[str], path: Path) -> Path | None:
    """Draw the validation losses of two runs in the same panels.

    Args:
        runs: as `results.read_run` returns them.
        labels: one per run, for the legend.
        path: of the picture.

    Returns:
        The path; None if no stage was validated in both.
    """
    stages = [
        name
        for name in runs[0]["stages"]
        if all((run["stages"].get(name) or {}).get("validation") for run in runs)
    ]
    if not stages:
        return None

    def picture() -> Figure:
        figure, panels = _panels(len(stages))
        for name, axes in zip(stages, panels, strict=True):
            for number, (run, label) in enumerate(zip(runs, labels, strict=True)):
                _plot_validation(axes, run["stages"][name]["validation"], _short(label), number)
            _label_losses(axes, name)
        return figure

    return _save(picture, path)


def _save(picture: Callable[[], Figure], path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(SETTINGS), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # shows a box
        picture().savefig(path, dpi=200, facecolor="white")
    return path


def _panels(count: int, height: float = 2.8) -> tuple[Figure, list[Axes]]:
    """A figure with panels below each other, each `height` inches high."""
    figure = Figure(figsize=(8, height * count), layout="constrained")
    return figure, list(figure.subplots(count, 1, squeeze=False)[:, 0])


# --- losses ---


def _draw_losses(stages: dict[str, Any]) -> Figure:
    figure, panels = _panels(len(stages))
    for (name, stage), axes in zip(stages.items(), panels, strict=True):
        training = stage["training"]
        if training:
            steps, losses = _columns(training, "step", "loss")
            axes.plot(steps, losses, color="#777777", linewidth=1, label="training")
        if stage["validation"]:
            _plot_validation(axes, stage["validation"], "validation", 0)
        for number, source in enumerate(validated_sources(stage)[:MAX_SOURCES], 1):
            key = f"eval_{source}_loss"
            axes.plot(
                *_columns([line for line in stage["validation"] if key in line], "step", key),
                color=COLOURS[number],
                linestyle=DASHES[number],
                marker=MARKS[number],
                markersize=4,
                linewidth=1,
                label=f"on {_short(source)}",
            )
        if stage["advice"]:
            _mark_advice(axes, stage["advice"][-1])
        _label_losses(axes, name)
    return figure


def _plot_validation(axes: Axes, lines: list[dict[str, Any]], label: str, number: int) -> None:
    """Plot validation losses with error bars in the style of this number."""
    steps, losses = _columns(lines, "step", "eval_loss")
    errors = [Z95 * (line.get("eval_loss_error") or 0) for line in lines]
    style = {"color": COLOURS[number], "linestyle": DASHES[number], "marker": MARKS[number]}
    axes.plot(steps, losses, linewidth=1.8, label=label, **style)
    axes.errorbar(steps, losses, yerr=errors, fmt="none", capsize=3, color=COLOURS[number])


def _mark_advice(axes: Axes, line: dict[str, Any]) -> None:
    """Mark the step of the last advice and the losses it projects for longer runs."""
    step, advice = line["step"], line["advice"]
    axes.axvline(step, color="black", linewidth=1, linestyle=":", label=f"advice at step {step:,}")
    if advice["projected"]:
        steps, ranges = zip(*advice["projected"].items(), strict=True)
        middle = [(least + most) / 2 for least, most in ranges]
        reach = [(most - least) / 2 for least, most in ranges]
        style = {"color": "black", "fmt": "_", "markersize": 10, "capsize": 5}
        label = f"{advice['rate']:.0%} projected"
        axes.errorbar([int(step) for step in steps], middle, yerr=reach, label=label, **style)


def _label_losses(axes: Axes, name: str) -> None:
    axes.set(title=name, xlabel="optimizer step", ylabel="loss, nats per token")
    axes.xaxis.set_major_formatter(INTEGER)
    low, high = axes.dataLim.intervaly
    if 0 < 3 * low < high:  # a linear scale would flatten all but the first steps
        axes.set_yscale("log")
        axes.set_ylabel("loss, nats per token (log)")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)


# --- throughput and memory ---


def _draw_speed(stages: dict[str, Any]) -> Figure:
    """A column per stage, each with its own scales: one may take seconds, another hours."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    grid = figure.subplots(2, len(stages), squeeze=False, sharex="col")
    for (name, stage), above, below in zip(stages.items(), *grid, strict=True):
        seconds = stage["reached"]["seconds"]
        unit, size = ("s", 1) if seconds < 180 else ("min", 60)
        if seconds >= 3 * 3600:
            unit, size = "h", 3600
        speeds = speeds_of(stage)
        style = {"color": COLOURS[0], "marker": "." if len(speeds) < 50 else "", "linewidth": 1}
        above.plot([at / size for at, _ in speeds], [speed for _, speed in speeds], **style)
        above.yaxis.set_major_formatter(INTEGER)
        lines = [line for line in stage["training"] if line.get("memory_bytes")]
        times, memory = _columns(lines, "seconds", "memory_bytes")
        below.plot([at / size for at in times], [held / GIB for held in memory], **style)
        peak, plan = stage["reached"]["peak_memory_bytes"], stage["record"].get("plan")
        for what, level, colour, dash in (
            ("peak", peak, COLOURS[1], "--"),
            ("planned", plan and plan["peak"], "black", ":"),
        ):
            if level:
                label = f"{what} {level / GIB:.2f} GiB"
                below.axhline(level / GIB, color=colour, linestyle=dash, label=label)
        if peak:
            below.legend(loc="lower center", frameon=False)
        for axes in (above, below):
            axes.margins(y=0.2)
        above.set(title=name, ylim=(0, None))
        below.set(xlabel=f"training time, {unit}", xlim=(0, None), ylim=(0, None))
    grid[0][0].set_ylabel("throughput, tokens/s")
    grid[1][0].set_ylabel("memory, GiB")
    return figure


# --- data ---


def _draw_data(stages: dict[str, Any]) -> Figure:
    """A row per stage: on the left what each source contributed, on the right its lengths."""
    counts = [len(_sources(stage)) for stage in stages.values()]
    figure = Figure(figsize=(8, sum(0.3 * count + 1.1 for count in counts)), layout="constrained")
    ratios = [0.3 * count + 1 for count in counts]
    grid = figure.subplots(
        len(stages), 2, squeeze=False, sharey="row", gridspec_kw={"height_ratios": ratios}
    )
    for (name, stage), (left, right) in zip(stages.items(), grid, strict=True):
        sources = _sources(stage)[::-1]  # the first source on top
        labels = [_short(source["source"]) for source in sources]
        unit = "characters" if "characters" in sources[0] else "tokens"
        key = "used" if "used" in sources[0] else unit
        bars = left.barh(range(len(labels)), [source[key] for source in sources], color=COLOURS[0])
        left.bar_label(bars, [f" {source[key]:,}" for source in sources], fontsize=9)
        what = "conversations this run used" if key == "used" else f"{unit} of text"
        left.set(title=name, xlabel=what)
        left.set_yticks(range(len(labels)), labels)
        left.margins(x=0.25)
        left.xaxis.set_major_locator(MaxNLocator(4))
        left.xaxis.set_major_formatter(INTEGER)
        lengths = [source["length_percentiles"] for source in sources]
        rows = [index for index, percentiles in enumerate(lengths) if percentiles]
        low, middle, high, most = (
            [percentiles[at] for percentiles in lengths if percentiles]
            for at in ("5", "50", "95", "100")
        )
        right.hlines(rows, low, high, color=COLOURS[0], linewidth=4, label="5% to 95%")
        right.plot(middle, rows, "o", color=COLOURS[1], label="median")
        right.plot(most, rows, "|", color="black", markersize=10, label="longest")
        right.set(xlabel=f"length, {unit}")
        if rows and max(most) > 100 * max(min(low), 1):
            right.set_xscale("log")
        else:
            right.set_xlim(0, None)
        right.xaxis.set_major_formatter(INTEGER)
    grid[0][1].legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, frameon=False)
    return figure


def _sources(stage: dict[str, Any]) -> list[dict[str, Any]]:
    return (stage["audit"] or {}).get("sources") or []


# --- evaluation ---


def _draw_evaluation(stages: dict[str, Any]) -> Figure:
    """The accuracy of every stage on every task, with its interval and the chance level."""
    tasks = list(dict.fromkeys(task for stage in stages.values() for task in accuracies(stage)))
    figure = Figure(figsize=(8, 1.2 + 0.45 * len(tasks)), layout="constrained")
    axes = figure.subplots()
    for number, (name, stage) in enumerate(stages.items()):
        scores = accuracies(stage)
        heights = [tasks.index(task) + 0.2 * (number - (len(stages) - 1) / 2) for task in scores]
        middle = [100 * score["accuracy"] for score in scores.values()]
        below = [100 * (score["accuracy"] - score["low"]) for score in scores.values()]
        above = [100 * (score["high"] - score["accuracy"]) for score in scores.values()]
        style = {"color": COLOURS[number], "fmt": MARKS[number], "markersize": 5, "capsize": 3}
        axes.errorbar(middle, heights, xerr=[below, above], label=f"after {name}", **style)
    known = {name: task for stage in stages.values() for name, task in accuracies(stage).items()}
    chances = [100 * known[task]["chance"] for task in tasks]
    style = {"color": "black", "markersize": 16, "label": "chance"}
    axes.plot(chances, range(len(tasks)), "|", **style)
    axes.set(xlabel="accuracy, % (95% interval)", xlim=(-2, 102))
    axes.set_yticks(range(len(tasks)), [_short(task) for task in tasks])
    axes.invert_yaxis()
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4, frameon=False)
    return figure


def _columns(lines: list[dict[str, Any]], *keys: str) -> list[list[float]]:
    """The values of each key; None becomes NaN, which leaves a gap."""
    return [[float("nan") if line[key] is None else line[key] for line in lines] for key in keys]


def _short(name: str) -> str:
    """A name truncated to its end, which distinguishes file names best."""
    return name if len(name) <= 28 else f"…{name[-27:]}"

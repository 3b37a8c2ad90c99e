"""Print a run's plan."""

from collections.abc import Callable
from typing import Any

from hfsft.plan.plan import UTILISATION, gigabytes
from hfsft.plan.step_memory import KINDS


def print_plan(planned: dict[str, Any]) -> None:
    """Print what `plan_run` returns: a table with a column for each stage, and what fits."""
    from hfsft.terminal import Terminal

    console = Terminal(highlight=False)
    stages = planned["stages"]
    console.print(_stages_table(stages))
    for name, data in stages.items():
        if data["auto"]:
            console.print(data["auto"])
        if not data["fits"]:
            console.print(
                f"{name} does not fit; what does:"
                if data["nearest"]
                else f"{name} does not fit, and nothing near it does"
            )
        for item in data["nearest"]:
            console.print(f"  {gigabytes(item['peak'])}  {item['settings']}")
        if data["seconds_per_step_uncompiled"] is not None:
            console.print(_compiled(name, data))
    estimated = [name for name, data in stages.items() if not data["timed"]]
    if len(estimated) < len(stages):
        console.print("Times are measured from a few micro-batches on this device.")
    if estimated:
        console.print(
            f"Times of {', '.join(estimated)} are estimated from FLOPs at {UTILISATION:.0%} of the "
            "measured matmul rate, on a GPU also from kernel launches; --time measures a few "
            "micro-batches of what fits."
        )
    console.print(f"The run takes up to {gigabytes(planned['disk'])} on disk.")
    for note in dict.fromkeys(note for data in stages.values() for note in data["notes"]):
        console.print(f"Note: {note}.", style="dim")


def _compiled(name: str, data: dict[str, Any]) -> str:
    """Whether compiled layers are worth it, for a stage that was timed with and without."""
    now, without = data["seconds_per_step"], data["seconds_per_step_uncompiled"]
    verdict = "is worth it" if now < without else "is not worth it: leave it out"
    return f"{name}: torch_compile {verdict}; {now:.3g} s a step with it, {without:.3g} s without."


def _stages_table(stages: dict[str, dict[str, Any]]) -> Any:
    """A column for each stage, a row for each figure of its plan."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, header_style="bold")
    table.add_column("GB")
    for name in stages:
        table.add_column(name, justify="right")

    def row(label: str, shown: Callable[[dict[str, Any]], str], **style: Any) -> None:
        table.add_row(label, *(shown(data) for data in stages.values()), **style)

    row("device", lambda data: f"{data['device']}, {data['precision']}")
    several = any(data["processes"] > 1 for data in stages.values())
    if several:
        row("processes", lambda data: f"{data['processes']}, {data['layout']}")
    row("micro-batch", lambda data: f"{data['rows']} x {data['length']:,}")
    row("optimizer", lambda data: data["optim"])
    row("checkpointing", lambda data: "yes" if data["checkpointing"] else "no", end_section=True)
    row("parameters, M", lambda data: f"{data['parameters'] / 1e6:.1f}")
    for kind in (*KINDS, "overhead"):
        label = "optimizer states" if kind == "optimizer" else kind
        row(label, lambda data, kind=kind: f"{data[kind] / 1e9:.2f}")
    row("peak", lambda data: f"{data['peak'] / 1e9:.2f}", style="bold")
    row("peak is in", lambda data: data["phase"])
    other = "peak_with_checkpointing_changed"
    row("peak, checkpointing toggled", lambda data: f"{data[other] / 1e9:.2f}")
    row("limit", lambda data: "none" if data["limit"] is None else f"{data['limit'] / 1e9:.2f}")
    row("fits", lambda data: "yes" if data["fits"] else "no", style="bold", end_section=True)
    row("steps", lambda data: f"{data['steps']:,}" if data["steps"] else "by epoch")
    row("tokens/step, at most", lambda data: f"{data['tokens_per_step']:,}")
    row("seconds/step, at most", lambda data: f"{data['seconds_per_step']:.3g}")
    if several:
        row("of these sending gradients", lambda data: f"{data['seconds_sent']:.3g}")
    row("tokens/s", lambda data: f"{data['tokens_per_step'] / data['seconds_per_step']:,.0f}")
    row("minutes, at most", _minutes)
    row("disk", lambda data: f"{data['disk'] / 1e9:.2f}")
    return table


def print_largest(found: list[dict[str, Any]]) -> None:
    """Print what `largest_models` returns."""
    from rich import box
    from rich.table import Table

    from hfsft.terminal import Terminal

    console = Terminal(highlight=False)
    table = Table(box=box.SIMPLE_HEAD, header_style="bold")
    for title in ("method", "parameters", "layers x width", "peak", "settings"):
        table.add_column(title, justify="left" if title in ("method", "settings") else "right")
    for item in found:
        sizes = ("none fits", "", "")
        if item["parameters"] is not None:
            shape = f"{item['layers']} x {item['width']:,}"
            sizes = (f"{item['parameters'] / 1e9:.2f} B", shape, gigabytes(item["peak"]))
        table.add_row(item["method"], *sizes, item["settings"])
    console.print(table)
    console.print(
        "Models of SmolLM2-1.7B's proportions with a vocabulary of 49,152, one row at a time, with "
        "activation checkpointing; estimated from traced steps, not run."
    )


def _minutes(data: dict[str, Any]) -> str:
    if data["steps"] is None:
        return "by epoch"
    return f"{data['steps'] * data['seconds_per_step'] / 60:,.1f}"

"""Compare two runs: which recipe keys differ, and which results differ beyond noise."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from hfsft.errors import HfsftError
from hfsft.hub.bounds import without_tokens
from hfsft.noise import Z95, ratio_error
from hfsft.report.markdown import plain, table, write_page
from hfsft.run.files import read_json_lines
from hfsft.run.results import MALFORMED, malformed, read_run


def write_comparison(
    folders: tuple[Path, Path], as_html: bool = False
) -> tuple[dict[str, Any], Path]:
    """Compare two runs and write the page to the second one's `report/`.

    Args:
        folders: the runs'.
        as_html: write one HTML file as well.

    Returns:
        What `compare_runs` returns, and the file to open.

    Raises:
        HfsftError: if one is not a run, or has malformed files, or the page cannot be written.
    """
    from hfsft.report.pictures import draw_both  # matplotlib takes a second

    runs = [read_run(folder) for folder in folders]
    path = folders[1] / "report" / f"against-{folders[0].absolute().name}.md"
    try:
        compared = compare_runs(*runs)
        picture = draw_both(runs, compared["runs"], path.with_suffix(".png"))
        text = without_tokens(comparison_text(compared, picture and picture.name))
        path.parent.mkdir(exist_ok=True)
        return compared, write_page(path, text, as_html)
    except OSError as error:
        raise HfsftError(f"{path} cannot be written: {error.strerror}") from None
    except MALFORMED as error:
        raise malformed(" or ".join(map(str, folders)), error) from error


def compare_runs(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Compare two runs.

    Args:
        first: as `results.read_run` returns it.
        second: the other one.

    Returns:
        `runs`; `recipe` and `environment`: dotted key → both values, where they differ; and
        `results`, one for each figure that both have: `stage`, `what`, `values` and `how`, and if
        its noise is known, `difference` (second minus first), `low` and `high` of its 95% interval,
        and `beyond_noise`.
    """
    recipes = [dict(_flat(run["recipe"])) for run in (first, second)]
    environments = [dict(_flat(_environment(run))) for run in (first, second)]
    results = []
    for name, stage in first["stages"].items():
        other = second["stages"].get(name)
        if stage and other:
            pair = [stage, other]
            folders = [Path(run["run"]) / name for run in (first, second)]
            results += [
                {"stage": name} | result
                for result in (*_losses(pair, folders), *_scores(pair, folders), *_costs(pair))
            ]
    return {
        "runs": [first["run"], second["run"]],
        "recipe": _differing(*recipes),
        "environment": _differing(*environments),
        "results": results,
    }


def _environment(run: dict[str, Any]) -> dict[str, Any]:
    keys = ("device", "processes", "precision", "versions")
    return {
        name: {key: stage["record"][key] for key in keys}
        for name, stage in run["stages"].items()
        if stage
    }


def _differing(one: dict[str, Any], two: dict[str, Any]) -> dict[str, list[Any]]:
    """Both values of each key whose values differ; the run's name is left out."""
    keys = [key for key in dict.fromkeys([*one, *two]) if key != "name"]
    return {key: [one.get(key), two.get(key)] for key in keys if one.get(key) != two.get(key)}


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested mappings, under dotted keys."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


# --- results ---


def _losses(pair: list[dict[str, Any]], folders: list[Path]) -> Iterator[dict[str, Any]]:
    """The validation losses, paired by document if both runs have the same held-out set."""
    values = [stage["reached"]["eval_loss"] for stage in pair]
    if None in values:
        return
    result = {"what": "validation loss, nats per token", "values": values}
    logs = [read_json_lines(folder / "validation.jsonl", nan_as_none=True) for folder in folders]
    last = [lines[-1] if lines else None for lines in logs]
    if all(last) and _same_documents(*last):
        losses = [np.array(line["losses"], dtype=float) for line in last]
        yield result | _paired(losses[1] - losses[0], np.array(last[0]["tokens"], dtype=float))
    else:
        yield result | {"how": "different held-out data: not comparable"}


def _same_documents(one: dict[str, Any], two: dict[str, Any]) -> bool:
    """Whether two lines of `validation.jsonl` are about the same held-out documents."""
    # earlier versions wrote no digest; rows of base text all have the same length
    digests = [line.get("documents") for line in (one, two)]
    return one["tokens"] == two["tokens"] and (None in digests or digests[0] == digests[1])


def _paired(differences: np.ndarray, tokens: np.ndarray) -> dict[str, Any]:
    """The mean difference per token and its 95% interval over the same documents.

    Args:
        differences: [documents], of the summed losses in nats.
        tokens: [documents], predicted tokens.
    """
    count, difference = len(tokens), differences.sum() / tokens.sum()
    reach = Z95 * ratio_error(differences, tokens) if count > 1 else 0.0
    return {
        "difference": float(difference),
        "low": float(difference - reach),
        "high": float(difference + reach),
        "beyond_noise": bool(count > 1 and abs(difference) > reach),
        "how": f"the same {count:,} held-out documents" + ", too few to tell" * (count < 2),
    }


def _scores(pair: list[dict[str, Any]], folders: list[Path]) -> Iterator[dict[str, Any]]:
    """The tasks that both stages were evaluated on."""
    if not all(stage["evaluation"] for stage in pair):
        return
    from hfsft.evaluation.differences import compare  # brings torch, which takes seconds

    for name, found in compare((folders[0], folders[1])).items():
        tasks = [stage["evaluation"]["tasks"][name] for stage in pair]
        key = "loss" if tasks[0]["kind"] == "loss" else "accuracy"
        yield {
            "what": f"{name}, {'loss, nats per token' if key == 'loss' else 'accuracy'}",
            "values": [task[key] for task in tasks],
            "difference": found["difference"],
            "low": found["low"],
            "high": found["high"],
            "beyond_noise": not found["within_noise"],
            "how": f"{'the same' if found['paired'] else 'different'} {found['rows']:,} rows",
        }


def _costs(pair: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Throughput, time and memory, whose noise is unknown from one run each."""
    for key, what in (
        ("tokens_per_second", "tokens/s"),
        ("seconds", "seconds"),
        ("peak_memory_bytes", "peak memory, bytes"),
    ):
        values = [stage["reached"][key] for stage in pair]
        if None not in values:
            yield {"what": what, "values": values, "how": "one run each"}


# --- as text ---


def comparison_text(compared: dict[str, Any], picture: str | None) -> str:
    """The comparison as Markdown.

    Args:
        compared: what `compare_runs` returns.
        picture: of both runs' losses, relative to the page.
    """
    names = [plain(run) for run in compared["runs"]]
    blocks = [f"# {names[0]} and {names[1]}", differences_text(compared)]
    for what in ("recipe", "environment"):
        rows = [[plain(key), *map(_setting, values)] for key, values in compared[what].items()]
        blocks.append(f"## {what.capitalize()}")
        blocks.append(table(["key", *names], rows, left=3) if rows else "The same.")
    blocks += ["## Results", *([f"![Validation losses]({picture})"] if picture else [])]
    blocks += _results_tables(compared["results"], names)
    return "\n\n".join(blocks) + "\n"


def _results_tables(results: list[dict[str, Any]], names: list[str]) -> list[str]:
    """A table of results with known noise, a note about noise, and a table of the others."""
    blocks = []
    rows = [
        [
            f"{result['stage']}: {plain(result['what'])}",
            *map(_figure, result["values"]),
            f"{_figure(result['difference'], '+')} "
            f"({_figure(result['low'], '+')} to {_figure(result['high'], '+')})",
            "**yes**" if result["beyond_noise"] else "no",
            result["how"],
        ]
        for result in results
        if "low" in result
    ]
    if rows:
        header = ["result", *names, "second - first (95% interval)", "beyond noise", "over"]
        blocks.append(table(header, rows))
    blocks.append(
        "Noise is that of the held-out sample: the same recipe with another seed may differ by "
        "more. Of twenty results that do not differ, one exceeds a 95% interval by chance."
    )
    rows = [
        [
            f"{result['stage']}: {plain(result['what'])}",
            *map(_figure, result["values"]),
            f"{result['values'][1] / result['values'][0]:.2f}" if result["values"][0] else "-",
            result["how"],
        ]
        for result in results
        if "low" not in result
    ]
    if rows:
        blocks.append(table(["with unknown noise", *names, "second / first", "why"], rows))
    return blocks


def differences_text(compared: dict[str, Any]) -> str:
    """The lines at the top: the keys that differ, and the results that differ beyond noise."""
    measured = [result for result in compared["results"] if "low" in result]
    beyond = [result for result in measured if result["beyond_noise"]]
    keys = ", ".join(map(plain, (*compared["recipe"], *compared["environment"]))) or "none"
    lines = [
        f"Keys of recipe and environment that differ: {keys}.",
        f"{len(beyond):,} of {len(measured):,} results differ beyond noise.",
    ]
    lines += [
        f"{result['stage']} {plain(result['what'])}: {_figure(result['values'][0])}, then "
        f"{_figure(result['values'][1])} (95% interval of the difference: "
        f"{_figure(result['low'], '+')} to {_figure(result['high'], '+')})."
        for result in beyond
    ]
    return "\n".join(f"- {line}" for line in lines)


def _setting(value: Any) -> str:
    return "not set" if value is None else plain(json.dumps(value, ensure_ascii=False))


def _figure(value: float, sign: str = "") -> str:
    return f"{value:{sign},.0f}" if abs(value) >= 100 else f"{value:{sign}.3f}"

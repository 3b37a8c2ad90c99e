"""The model card of a finished stage: what it is, what it learned from, and how to use it."""

import json
import os
import textwrap
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from hfsft.data.tasks import TASKS
from hfsft.hub.client import dataset_licence, without_paths, without_tokens
from hfsft.recipe.schema import Source, Stage

# of the sources that come with hfsft, as NOTICE says; the tasks are made by its own code
LICENCES = {
    "speeches": "public domain (works of the United States Government)",
    "facts": "mit",
    "reasoning_gym": "apache-2.0",
    **dict.fromkeys(TASKS, "apache-2.0"),
}


def model_card(stage: Stage, record: dict[str, Any]) -> str:
    """The model card, in the Hub's format; the licences of the Hub's datasets are looked up there.

    Args:
        stage: finished, with its `data.json`.
        record: its `stage.json`.
    """
    start, way = _lineage(record)
    datasets = [source.path for source in stage.data if _is_on_hub(source.path)]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["hfsft", stage.name],
        base_model=start if start and _is_on_hub(start) else None,
        datasets=list(dict.fromkeys(datasets)) or None,
    )
    settings = {key: value for key, value in record["settings"].items() if key != "start"}
    settings = without_paths(settings)
    # indented, not fenced: nothing in it can end the block
    recipe = textwrap.indent(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True), "    ")
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    messages = '[{"role": "user", "content": "Who are you?"}]'
    return without_tokens(f"""---
{data.to_yaml()}
---

# {stage.folder.parent.name}/{stage.name}

The {stage.name} stage of a small chat model, trained with hfsft {record["versions"]["hfsft"]}.

```python
from transformers import pipeline

chat = pipeline("text-generation", model="{stage.folder.as_posix()}")
print(chat({messages})[0]["generated_text"][-1]["content"])
```

| | |
|---|---|
| lineage | {_cell(" → ".join(way))} |
| parameters | {record["parameters"]:,} ({record["trained_parameters"]:,} trained) |
| steps | {record["steps"]:,} of {record["examples_per_step"]:,} examples |
| tokens | {record["tokens"]:,} |
| training loss | {_loss(record["train_loss"])} in the last steps |
| validation loss | {_validation(record)} |
| hardware | {record["device"]}, {record["processes"]} process(es), {record["precision"]} |
| time | {record["seconds"]:,.0f} s |
| peak memory | {record["peak_memory_bytes"] / 2**30:.2f} GiB ({record["peak_memory_of"]}) |

## Data

| source | rows | licence |
|---|---|---|
{_data_rows(stage)}

## Recipe

{recipe}
Trained with {versions}. `stage.json` says all of it for programs.
""")


def _lineage(record: dict[str, Any]) -> tuple[str | None, list[str]]:
    """The model at the very beginning, if it was not a fresh one; and the way from there."""
    way, here = [f"{record['stage']} ({record['steps']:,} steps)"], record["lineage"]
    while here["stage"] is not None:
        earlier = here["stage"]
        way.append(f"{earlier['stage']} ({earlier['steps']:,} steps)")
        here = earlier["lineage"]
    start = here["model"]
    shown = "a fresh model"
    if start is not None:
        shown = _shown(start) + (f" at {here['revision']}" if here["revision"] else "")
    return start, [shown, *reversed(way)]


def _data_rows(stage: Stage) -> str:
    audit = stage.folder / "data.json"
    audited = json.loads(audit.read_text())["sources"] if audit.is_file() else []
    kept = {source["source"]: f"{source['kept']:,}" for source in audited}
    licences = {source.path: _licence(source.path) for source in stage.data}
    rows = [
        f"| {_source(source)} | {kept.get(str(source), 'streamed')} | "
        f"{_cell(licences[source.path])} |"
        for source in stage.data
    ]
    return "\n".join(dict.fromkeys(rows))


def _source(source: Source) -> str:
    shown = _cell(_shown(source.path) + (f":{source.name}" if source.name else ""))
    if not _is_on_hub(source.path):
        return shown
    at = f" at {_cell(source.revision)}" if source.revision else ""
    return f"[{shown}](https://huggingface.co/datasets/{source.path}){at}"


def _licence(path: str) -> str:
    if path in LICENCES:
        return LICENCES[path]
    if _is_on_hub(path):
        return dataset_licence(path) or "not stated on its page"
    return "not stated: a file of the author's"


def _is_on_hub(path: str) -> bool:
    """Whether a path that was read is a name on the Hub: nothing of hfsft's, and no file here."""
    if path in LICENCES or os.path.exists(path) or path.startswith((".", "/", "~")):
        return False
    try:
        validate_repo_id(path)
    except HFValidationError:  # a glob, an address
        return False
    return True


def _shown(path: str) -> str:
    """The path, of a local one its name alone."""
    return path if path in LICENCES or _is_on_hub(path) else Path(path).name


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", r"\|")


def _loss(loss: float | None) -> str:
    return "not logged" if loss is None else f"{loss:.4f}"


def _validation(record: dict[str, Any]) -> str:
    if record["eval_loss"] is None:
        return "not validated"
    return f"{record['eval_loss_before']:.4f} before, {record['eval_loss']:.4f} after"

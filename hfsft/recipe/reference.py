"""The page docs/recipes.md, made from the declarations of the keys.

python -m hfsft.recipe.reference > docs/recipes.md
"""

from collections.abc import Iterable

from hfsft.recipe.key import STAGES, UNSET, Key, declared_keys, overlaid
from hfsft.recipe.names import ALIASES, FLAGS, REFUSED, REFUSED_LORA
from hfsft.recipe.schema import Replay, Source, Stage
from hfsft.recipe.sections import (
    DEPTH,
    EXTENDS,
    GENERATION,
    LORA,
    MODEL,
    MODEL_CONFIG,
    MUON_SETTINGS,
    TOKENIZER,
    TOP,
    lora_section,
    stage_keys,
)
from hfsft.recipe.upstream import model_fields

INTRODUCTION = """\
# Recipes: every key

<!-- made by `python -m hfsft.recipe.reference > docs/recipes.md`; edit the declarations instead -->

A recipe is one YAML file that describes one run:

```yaml
extends: fast            # optional: a built-in recipe, or a file beside this one
name: mine
sft:
  data: [chats.jsonl]
  max_steps: 300
```

- **Precedence**: hfsft's defaults < the recipe it extends < the recipe < the command line.
  Mappings are merged; lists and everything else are replaced.
- **Overrides**: `--sft.max_steps 300`, or `--max_steps 300` if the command runs one stage. Dotted
  paths reach into lists and mappings: `--sft.data.0.rows 500`, `--sft.lora.r 8`.
- **Upstream's keys**: a stage's section takes every field of `transformers.TrainingArguments` (in
  sft: `trl.SFTConfig`), `lora` every field of `peft.LoraConfig`, and `model` with a `model_type`
  every field of that model's configuration, all passed through. The tables list those that hfsft
  bounds, gives a default of its own, or lets change on resume; the others may not change.
- **`auto`**: the stage's plan chooses a value that fits into memory.
- **Shares**: where a table says so, a value below 1 is a share: `eval_steps: 0.25` validates four
  times.
- **Mistakes**: an unknown key, a wrong type or an impossible value is an error that names the file
  and line (or the flag), the key, and the nearest known key.
- **Resume**: the same command resumes an interrupted stage. If a key changed that may not, it
  refuses and names the key. "yes, to rounding" means that sums are grouped differently, so the
  last digits may change.

An empty default means that the key is not set, or has upstream's default. `-` means that the stage
does not take the key.
"""


def page() -> str:
    """The page: an introduction and one table for each section of a recipe."""
    own = declared_keys(Stage)
    # SFTConfig extends TrainingArguments: sft takes all of upstream's keys
    upstream = {name: one for name, one in stage_keys("sft").items() if name not in own}
    config = overlaid(model_fields("llama"), MODEL_CONFIG)
    sections = [
        ("The top level", _table({"extends": EXTENDS} | TOP)),
        ("`base`, `mid`, `sft`: hfsft's own keys", _stage_table(own)),
        ("`base`, `mid`, `sft`: keys of transformers and trl", _stage_table(upstream)),
        ("An item of `data`", _table(declared_keys(Source))),
        ("`replay`", _replay()),
        ("`model`", _table(MODEL | DEPTH | {name: config[name] for name in MODEL_CONFIG})),
        ("`tokenizer`", _table(TOKENIZER)),
        ("`generation`", _table(GENERATION)),
        ("`lora`", _table({name: lora_section()[name] for name in LORA})),
        ("`muon`", _table(MUON_SETTINGS)),
        ("Flags, on the command line only", _rows(("flag", ""), _flags())),
        ("The reference pipeline's flags", _rows(("flag", "key"), _aliases())),
        ("Upstream's keys that cannot be set", _rows(("key", "why"), _refused())),
    ]
    parts = [INTRODUCTION, *(f"## {title}\n\n{table}" for title, table in sections)]
    return "\n".join(parts)


def _table(keys: dict[str, Key]) -> str:
    """The keys of a section that belongs to no stage."""
    return _rows(
        ("key", "default", "takes", "may change on resume", ""),
        (
            (f"`{name}`", _shown(one), one.takes(), one.on_resume, one.help)
            for name, one in keys.items()
        ),
    )


def _replay() -> str:
    """The keys that `replay` has besides those of a source."""
    others = declared_keys(Source)
    own = {name: one for name, one in declared_keys(Replay).items() if name not in others}
    return (
        "Those of an item of `data` except `repeat`, `weight` and `streaming`, and:\n\n"
        + _table(own)
    )


def _stage_table(keys: dict[str, Key]) -> str:
    """The keys of the stages' sections, with their default in each stage."""
    taken = {stage: stage_keys(stage) for stage in STAGES}

    def default(name: str, stage: str) -> str:
        return _shown(taken[stage][name], stage) if name in taken[stage] else "-"

    return _rows(
        ("key", *STAGES, "takes", "may change on resume", ""),
        (
            (
                f"`{name}`",
                *(default(name, stage) for stage in STAGES),
                one.takes(),
                one.on_resume,
                one.help,
            )
            for name, one in keys.items()
        ),
    )


def _flags() -> Iterable[tuple[str, str]]:
    return ((f"`--{flag}`", text) for flag, text in FLAGS.items())


def _aliases() -> Iterable[tuple[str, str]]:
    return ((f"`--{alias}`", f"`{name}`") for alias, name in ALIASES.items())


def _refused() -> Iterable[tuple[str, str]]:
    yield from ((f"`{name}`", why.replace("<", r"\<")) for name, why in REFUSED.items())
    yield from ((f"`lora.{name}`", "hfsft sets it") for name in REFUSED_LORA)


def _shown(one: Key, stage: str = "") -> str:
    """A key's default as YAML writes it; empty if it has none."""
    value = one.default_in(stage)
    if value is UNSET or value == {} or (value is None and not one.null):
        return ""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return "; ".join(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _rows(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [head, ("---",) * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    print(page(), end="")

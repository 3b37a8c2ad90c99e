"""Recipes: what is refused and how it is said, who overrides whom, and the files in recipes/."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from hfsft.errors import RecipeError
from hfsft.recipe.loading import STAGES, load_recipe
from hfsft.recipe.schema import Recipe

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
# what stands before the line that a test is about, which is line 4 then
SFT = "sft:\n  model_name_or_path: model\n  data: [identity]\n"
BASE = (
    "model: {depth: 2, vocab_size: 300, max_position_embeddings: 64}\n"
    "tokenizer: {train: true}\n"
    "base:\n  data: [facts]\n  max_steps: 3\n"
)
MID = "mid:\n  data: [identity]\n  max_steps: 3\n"

each_recipe = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    """Every test runs in a folder of its own, so that messages say `r.yaml`."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(text: str | bytes, *argv: str, stage: str | None = "sft") -> Recipe:
    """Load a recipe of that text, as the stage's script does."""
    Path("r.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_recipe("r.yaml", *argv, stage=stage)


def message(text: str | bytes, *argv: str, stage: str | None = "sft") -> str:
    """What a recipe that cannot be run is told."""
    with pytest.raises(RecipeError) as refused:
        load(text, *argv, stage=stage)
    said = str(refused.value)
    assert said.count("\n") <= 1
    assert len(said) < 300
    return said


# --- what a recipe says wrong ---

UNKNOWN = [
    ("sfft:\n  data: [identity]\n", "r.yaml:1: unknown key 'sfft'; did you mean 'sft'?"),
    (SFT + "  max_step: 3\n", "r.yaml:4: unknown key 'max_step' in sft; did you mean 'max_steps'?"),
    (
        SFT + "  max steps: 3\n",
        "r.yaml:4: unknown key 'max steps' in sft; did you mean 'max_steps'",
    ),
    (
        SFT + "  máx_steps: 3\n",
        "r.yaml:4: unknown key 'máx_steps' in sft; did you mean 'max_steps'",
    ),
    (SFT + "  lr: 1e-3\n", "r.yaml:4: unknown key 'lr' in sft; did you mean 'learning_rate'?"),
    (
        SFT + "  zebra: 3\n",
        "r.yaml:4: unknown key 'zebra' in sft; it is none of hfsft's, nor of trl",
    ),
    (
        SFT + "  eval_every: 3\n",
        "r.yaml:4: unknown key 'eval_every' in sft; its name in a recipe is",
    ),
    (
        SFT + "  tokens_per_step: 3\n",
        "r.yaml:4: unknown key 'tokens_per_step' in sft; it belongs in",
    ),
    (
        SFT + "  extends: demo.yaml\n",
        "r.yaml:4: unknown key 'extends' in sft; it belongs at the top",
    ),
    (SFT + "max_steps: 3\n", "r.yaml:4: unknown key 'max_steps'; it belongs in a stage's section"),
    (
        SFT + "restart: true\n",
        "r.yaml:4: unknown key 'restart'; only the command line takes it (--r",
    ),
    (SFT + "  lora: {rank: 8}\n", "r.yaml:4: unknown key 'rank' in sft.lora; did you mean 'r'?"),
    (SFT + "model: {dept: 8}\n", "r.yaml:4: unknown key 'dept' in model; did you mean 'depth'?"),
    (SFT + "model: {depth: 8, hidden_size: 9}\n", "unknown key 'hidden_size' in model; known are "),
    (
        SFT + "tokenizer: {trian: true}\n",
        "r.yaml:4: unknown key 'trian' in tokenizer; did you mean",
    ),
    (
        "sft: {data: [{path: x, row: 3}]}\n",
        "r.yaml:1: unknown key 'row' in sft.data.0; did you mean",
    ),
    ('"\\e[31m\\n": 3\n', r"r.yaml:1: unknown key '\x1b[31m\n'; known are base, mid, model, name"),
    ("5: 3\n", "r.yaml:1: unknown key '5'; known are base, mid, model, name, output_dir, sample_p"),
]
WRONG_TYPES = [
    (
        SFT + "  max_steps: 12.5\n",
        "r.yaml:4: sft.max_steps: expected a whole number or null, got 12.5",
    ),
    (
        SFT + '  max_steps: "ten"\n',
        "r.yaml:4: sft.max_steps: expected a whole number or null, got 'ten'",
    ),
    (
        SFT + "  max_steps: true\n",
        "r.yaml:4: sft.max_steps: expected a whole number or null, got true",
    ),
    (
        SFT + "  max_steps: [1]\n",
        "r.yaml:4: sft.max_steps: expected a whole number or null, got a list",
    ),
    (
        SFT + "  max_steps: 2024-01-01\n",
        "r.yaml:4: sft.max_steps: expected a whole number or null, got",
    ),
    (
        SFT + "  max_steps: 0x10\n",
        "r.yaml:4: sft.max_steps: expected a whole number or null, got '0x10'",
    ),
    (SFT + "  max_steps: null\n", "r.yaml:4: sft: needs max_steps (or num_train_epochs)"),
    (SFT + "  learning_rate: '1e-3'\n", "expected a number, got '1e-3' (leave the quotes out)"),
    (
        SFT + "  learning_rate: .nan\n",
        "r.yaml:4: sft.learning_rate: expected a finite number, got .nan",
    ),
    (SFT + "  learning_rate: -.inf\n", "sft.learning_rate: expected a finite number, got -.inf"),
    (SFT + "  eval_strategy: false\n", "sft.eval_strategy: 'false' is not one of no, steps, epoch"),
    (SFT + "  held_out: null\n", "r.yaml:4: sft.held_out: expected a number, got null"),
    (SFT + "  load_in_4bit: 4\n", "r.yaml:4: sft.load_in_4bit: expected true or false, got 4"),
    (SFT + "  lora: true\n", "r.yaml:4: sft.lora: expected a mapping or null, got true"),
    (SFT + "  lora: {r: 4.5}\n", "r.yaml:4: sft.lora.r: expected a whole number, got 4.5"),
    (
        SFT + "  lora: {target_modules: [1]}\n",
        "sft.lora.target_modules: expected text for each item",
    ),
    (
        SFT + "  lr_scheduler_kwargs: 5\n",
        "sft.lr_scheduler_kwargs: expected a mapping or null, got 5",
    ),
    (SFT + "output_dir: null\n", "r.yaml:4: output_dir: expected text, got null"),
    (SFT + "sample_prompts: [Hi, 2]\n", "r.yaml:4: sample_prompts.1: expected text, got 2"),
    (SFT + "sample_prompts: Hi\n", "r.yaml:4: sample_prompts: expected a list, got 'Hi'"),
    (SFT + "tokenizer: 5\n", "r.yaml:4: tokenizer: expected a mapping or text or null, got 5"),
    (SFT + "model: llama\n", "r.yaml:4: model: expected a mapping or null, got 'llama'"),
    ("sft: 5\n", "r.yaml:1: sft: expected a mapping or null, got 5"),
]
IMPOSSIBLE = [
    (SFT + "  max_steps: 0\n", "r.yaml:4: sft.max_steps: 0 is not possible: it must be at least 1"),
    (SFT + f"  max_steps: 9{'0' * 22}\n", "is not possible: it must be at most 2,147,483,648"),
    (SFT + f"  max_steps: {'9' * 5000}\n", f"r.yaml:4: cannot read '{'9' * 57}...'"),
    (SFT + "  learning_rate: -1\n", "sft.learning_rate: -1 is not possible: it must be above 0"),
    (SFT + "  lora: {r: -4}\n", "r.yaml:4: sft.lora.r: -4 is not possible: it must be at least 1"),
    (SFT + "  held_out: -1\n", "r.yaml:4: sft.held_out: -1 is not possible: it must be at least 0"),
    (
        SFT + "  held_out: 1.5\n",
        "sft.held_out: 1.5 is not possible: a share is below 1, and a number",
    ),
    (
        SFT + "  eval_steps: 0\n",
        "sft.eval_steps: expected a number above 0, or -1 for no validation",
    ),
    (
        SFT + "  optim: adamw\n",
        "sft.optim: 'adamw' is not one of its 41 choices; did you mean 'adamw_",
    ),
    (SFT + "  loss_type: dpo\n", "r.yaml:4: sft.loss_type: 'dpo' is not one of nll, dft"),
    (SFT + "  attn_implementation: flash\n", "; did you mean 'flash_attention_2'?"),
    (
        SFT + "  memory_limit: lots\n",
        "sft.memory_limit: expected a size such as 8GB or 7.5GiB, got 'lots'",
    ),
    (
        SFT + "  memory_limit: 0GB\n",
        "sft.memory_limit: expected a size such as 8GB or 7.5GiB, got '0GB'",
    ),
    (SFT + "seed: -1\n", "r.yaml:4: seed: -1 is not possible: it must be at least 0"),
    (SFT + "name: ../x\n", "r.yaml:4: name: '../x' cannot be a folder's name"),
    (SFT + "name: a/b\n", "r.yaml:4: name: 'a/b' cannot be a folder's name"),
    (SFT + 'name: "a\\nb"\n', r"r.yaml:4: name: 'a\nb' cannot be a folder's name"),
    (SFT + f"name: {'x' * 300}\n", "...' cannot be a folder's name"),
    (SFT + 'output_dir: "a\\0b"\n', r"r.yaml:4: output_dir: 'a\x00b' holds a NUL character"),
    (SFT + "output_dir: ''\n", "r.yaml:4: output_dir: must not be empty"),
    (
        SFT + "model: {depth: 0}\n",
        "r.yaml:4: model.depth: 0 is not possible: it must be at least 1",
    ),
    (SFT + "model: {model_type: lama}\n", "transformers knows no 'lama'; did you mean 'llama'?"),
    (
        SFT + "model: {model_type: /etc}\n",
        "r.yaml:4: model.model_type: transformers knows no '/etc'",
    ),
    (
        SFT + "model: {model_type: llama, hidden_size: -5}\n",
        "model.hidden_size: -5 is not possible",
    ),
]
CONFLICTS = [
    (
        SFT + "  max_steps: 3\n  max_steps: 4\n",
        "r.yaml:5: 'max_steps' is given twice, first at r.yaml:4",
    ),
    (SFT + "  lora: {r: 3, r: 4}\n", "r.yaml:4: 'r' is given twice, first at r.yaml:4"),
    (SFT + "  <<: {a: 1}\n  <<: {a: 1}\n", "r.yaml:5: '<<' is given twice, first at r.yaml:4"),
    (
        SFT + "  max_steps: 3\n  num_train_epochs: 1\n",
        "r.yaml:5: sft.num_train_epochs: max_steps is given",
    ),
    (SFT + "  bf16: true\n  fp16: true\n", "r.yaml:5: sft.fp16: bf16 is on as well; choose one"),
    (
        SFT + "  load_in_4bit: true\n",
        "sft.load_in_4bit: 4-bit weights cannot be trained themselves; add l",
    ),
    (
        SFT + "  gradient_checkpointing: false\n  activation_checkpointing: true\n",
        "r.yaml:5: sft.activ",
    ),
    (
        SFT + "tokenizer: {train: true, path: x}\n",
        "r.yaml:4: tokenizer.path: train is on as well; cho",
    ),
    (
        SFT + "model: {depth: 2, model_type: llama}\n",
        "r.yaml:4: model.depth: model_type is given as we",
    ),
    (
        "sft: {data: [identity], model_name_or_path: sft}\n",
        "sft cannot start from sft; earlier stages",
    ),
]
NOT_HERE = [
    (
        SFT + "  trust_remote_code: true\n",
        "r.yaml:4: sft.trust_remote_code: only the command line may",
    ),
    (
        SFT + "trust_remote_code: true\n",
        "r.yaml:4: trust_remote_code: only the command line may say it",
    ),
    (
        "sft: {data: [{path: x, trust_remote_code: true}]}\n",
        "r.yaml:1: sft.data.0.trust_remote_code: on",
    ),
    (
        SFT + "  hub_token: hf_x\n",
        "sft.hub_token cannot be set: tokens are kept in no file: run `hf auth",
    ),
    (
        SFT + "hub_token: hf_x\n",
        "r.yaml:4: hub_token cannot be set: tokens are kept in no file: run `hf",
    ),
    (
        SFT + "  deepspeed: x.json\n",
        "r.yaml:4: sft.deepspeed cannot be set: choose it with `accelerate l",
    ),
    (
        SFT + "  fsdp: full_shard\n",
        "r.yaml:4: sft.fsdp cannot be set: choose it with `accelerate launch",
    ),
    (
        SFT + "  packing: true\n",
        "sft.packing cannot be set: it would change which conversations share a",
    ),
    (SFT + "  seed: 3\n", "r.yaml:4: sft.seed cannot be set: it belongs at the top of the recipe"),
    (
        SFT + "  lora: {task_type: CAUSAL_LM}\n",
        "r.yaml:4: sft.lora.task_type cannot be set: hfsft sets it",
    ),
]
DATA = [
    ("[]", "r.yaml:2: sft.data: expected a list of sources, such as [{path: identity}]"),
    ("{}", "r.yaml:2: sft.data: expected a list, got a mapping"),
    ("null", "r.yaml:2: sft.data: expected a list, got null"),
    ("[identity, null]", "r.yaml:2: sft.data.1: a source needs a path"),
    ("[5]", "r.yaml:2: sft.data.0: expected a mapping, got 5"),
    ("[{path: ''}]", "r.yaml:2: sft.data.0.path: must not be empty"),
    (
        "[{path: x, rows: -5}]",
        "r.yaml:2: sft.data.0.rows: -5 is not possible: it must be at least 1",
    ),
    ("[{path: x, columns: [a]}]", "r.yaml:2: sft.data.0.columns: expected a mapping, got a list"),
    ("[{path: x, columns: {a: [b]}}]", "r.yaml:2: sft.data.0.columns.a: expected text, got a list"),
    (
        "[{path: x, format: chatml}]",
        "r.yaml:2: sft.data.0.format: 'chatml' is not one of text, messages",
    ),
    (
        "[{path: x, format: text}]",
        "r.yaml:2: sft.data.0: format text is for base; sft learns from con",
    ),
    (
        "\n  - x\n  - {path: y, streaming: true}",
        "r.yaml:4: sft.data.1: streaming is for base text; a c",
    ),
]
FILES = [
    ("", "r.yaml: the file is empty; see recipes/demo.yaml for a whole one"),
    ("# nothing\n", "r.yaml: the file is empty"),
    ("- a\n- b\n", "r.yaml:1: a recipe is a mapping of keys, not a list"),
    ("hello\n", "r.yaml:1: a recipe is a mapping of keys, not 'hello'"),
    (b"\x89PNG\r\n\x1a\n", "r.yaml: not UTF-8 text (byte 0)"),
    ("sft: {}\n".encode("utf-16"), "r.yaml: not UTF-8 text (byte 0)"),
    (b"a: \x07\n", "r.yaml: not valid YAML: unacceptable character #x0007"),
    ("sft:\n\tdata: [identity]\n", r"r.yaml:2: not valid YAML: found character '\t'"),
    ("sft: [1, 2\n", "r.yaml:2: not valid YAML: expected ',' or ']'"),
    ("a: b: c\n", "r.yaml:1: not valid YAML: mapping values are not allowed here"),
    ("sft: *x\n", "r.yaml:1: not valid YAML: found undefined alias 'x'"),
    ("sft: 1\n---\nsft: 2\n", "r.yaml:2: not valid YAML: but found another document"),
    ("? [a]\n: b\n", "r.yaml:1: a key must be plain text"),
    ("sft:\n  lora: &a\n    r: *a\n", "nested more than 50 deep; does an alias hold itself?"),
    ("sft: &a\n  <<: *a\n", "r.yaml:2: nested more than 50 deep; does an alias hold itself?"),
    ("a: " + "[" * 3000, "r.yaml: nested more than 50 deep"),
    (SFT + "  <<: 5\n", "r.yaml:4: << takes a mapping, got 5"),
    (
        SFT + "  max_steps: !!python/object/apply:os.getcwd []\n",
        "r.yaml:4: leave the tag !!python/obj",
    ),
    (SFT + "  max_steps: !!float ''\n", "r.yaml:4: leave the tag !!float out"),
    ("sft: !!set {data}\n", "r.yaml:1: leave the tag !!set out"),
]
EXTENDS = [
    ("extends: none.yaml\n", "r.yaml:1: extends: no such file 'none.yaml'"),
    (
        "extends: /nowhere/fast.yaml\n",
        "r.yaml:1: extends: no such file '/nowhere/fast.yaml'; did you mean",
    ),
    ("extends: .\n", "r.yaml:1: extends: '.' is a folder, not a recipe"),
    ("extends: r.yaml\n", "r.yaml:1: extends: r.yaml extends this file in turn"),
    ("extends: loop.yaml\n", "loop.yaml:1: extends: r.yaml extends this file in turn"),
    ("extends: null\n", "r.yaml:1: extends: expected text, got null"),
    ("extends: ''\n", "r.yaml:1: extends: must not be empty"),
    (f"extends: {'x' * 400}\n", "r.yaml:1: extends: no such file 'xxx"),
    (
        "extends: parent.yaml\n",
        "parent.yaml:2: unknown key 'max_step' in sft; did you mean 'max_steps'?",
    ),
    (
        "extends: fast.yaml\nextends: demo.yaml\n",
        "r.yaml:2: 'extends' is given twice, first at r.yaml:1",
    ),
]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        *UNKNOWN,
        *WRONG_TYPES,
        *IMPOSSIBLE,
        *CONFLICTS,
        *NOT_HERE,
        *((f"sft:\n  data: {data}\n", said) for data, said in DATA),
        *FILES,
        *EXTENDS,
    ],
    ids=lambda value: repr(value)[-50:] if isinstance(value, (str, bytes)) else None,
)
def test_broken_recipe(text, said):
    Path("loop.yaml").write_text("extends: r.yaml\n")
    Path("parent.yaml").write_text("sft:\n  max_step: 3\n")
    assert said in message(text)


BROKEN_BASE = [
    (
        BASE.replace("depth: 2, ", ""),
        "r.yaml:3: base: builds a fresh model and needs model: {depth: 8}",
    ),
    (
        BASE.replace("train: true", ""),
        "r.yaml:3: base: needs a tokenizer: {train: true} or {path: F",
    ),
    (
        BASE + "  max_length: 65\n",
        "r.yaml:6: base.max_length: 65 is more than the model's max_positio",
    ),
    (
        BASE + MID + "  max_length: 65\n",
        "r.yaml:9: mid.max_length: 65 is more than the model's max_po",
    ),
    (
        BASE + "  tokens_per_step: 1000\n",
        "r.yaml:6: base.tokens_per_step: 1,000 is no multiple of 64",
    ),
    (BASE + "  lora: {r: 4}\n", "r.yaml:6: unknown key 'lora' in base; it belongs in mid or sft"),
    (
        BASE + MID + "  model_name_or_path: sft\n",
        "r.yaml:9: mid.model_name_or_path: mid cannot start",
    ),
    (
        BASE + MID + "  tokens_per_step: 100\n",
        "r.yaml:9: mid.tokens_per_step: 100 is no multiple of 1,024",
    ),
    (
        BASE.replace("[facts]", "[{path: x, format: alpaca}]"),
        "r.yaml:4: base.data.0: format alpaca is",
    ),
    (
        BASE.replace("[facts]", "[{path: x, streaming: true, rows: 5}]"),
        "r.yaml:4: base.data.0: a streaming x is read as it trains: no rows, first, "
        "repeat or weight",
    ),
]


@pytest.mark.parametrize(("text", "said"), BROKEN_BASE, ids=[said[:40] for _, said in BROKEN_BASE])
def test_broken_base_or_mid(text, said):
    assert said in message(text, stage=None)


BOMBS = {
    "aliases": "a: &a0 [x, x]\n"
    + "".join(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10)),
    "merges": "a: &a0 {k: 1}\n"
    + "".join(f"a{i}: &a{i} {{<<: [{','.join([f'*a{i - 1}'] * 10)}]}}\n" for i in range(1, 10)),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_ten_nested_aliases_are_no_billion_values(bomb):
    assert message(BOMBS[bomb]) == "r.yaml: more than 100,000 values; do its aliases nest?"


# --- what a command line says wrong ---


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (
            ["--max_step", "5"],
            "--max_step: unknown key 'max_step' in sft; did you mean 'max_steps'?",
        ),
        (
            ["--max-steps", "5"],
            "--max-steps: unknown key 'max-steps' in sft; did you mean 'max_steps'?",
        ),
        (
            ["--MAX_STEPS", "5"],
            "--MAX_STEPS: unknown key 'MAX_STEPS' in sft; did you mean 'max_steps'?",
        ),
        (["--lr", "1e-3"], "--lr: unknown key 'lr' in sft; did you mean 'learning_rate'?"),
        (
            ["--stf.max_steps", "5"],
            "--stf.max_steps: unknown key 'stf.max_steps'; did you mean 'sft'?",
        ),
        (["--lora.rank", "8"], "--lora.rank: unknown key 'rank' in sft.lora; did you mean 'r'?"),
        (["--no_bf16"], "--no_bf16: unknown key 'no_bf16' in sft; did you mean 'bf16'?"),
        (["--sft.max_steps"], "--sft.max_steps: needs a value"),
        (["--max_steps="], "--max_steps: needs a value"),
        (["--max_steps", ""], "--max_steps: needs a value"),
        (["--max_steps", "--bf16"], "--max_steps: needs a value"),
        (
            ["--max_steps", "ten"],
            "--max_steps: sft.max_steps: expected a whole number or null, got 'ten'",
        ),
        (
            ["--max_steps=12.5"],
            "--max_steps: sft.max_steps: expected a whole number or null, got 12.5",
        ),
        (
            ["--max_steps", "a: b: c"],
            "--max_steps: not valid YAML: mapping values are not allowed here",
        ),
        (["--max_steps", "5", "6"], "unexpected argument '6'; settings are given as --key value"),
        (["max_steps=5"], "unexpected argument 'max_steps=5'; settings are given as --key value"),
        (
            ["-max_steps", "5"],
            "unexpected argument '-max_steps'; settings are given as --key value",
        ),
        (["--", "5"], "unexpected argument '--'; settings are given as --key value"),
        (["--max_steps=5", "--max_steps=6"], "--max_steps: given twice, first as --max_steps"),
        (
            ["--max_steps=5", "--sft.max_steps=5"],
            "--sft.max_steps: given twice, first as --max_steps",
        ),
        (
            ["--max_steps=5", "--num_iterations=5"],
            "--num_iterations: given twice, first as --max_steps",
        ),
        (["--lora.r=5", "--lora={r: 4}"], "--lora: would undo --lora.r; give --lora first"),
        (["--restart", "--restart"], "--restart: given twice"),
        (["--restart", "maybe"], "--restart: takes no value, got 'maybe'"),
        (["--lora", "{r: 4, r: 5}"], "--lora: 'r' is given twice, first at --lora"),
        (["--lora.r", "-8"], "--lora.r: sft.lora.r: -8 is not possible: it must be at least 1"),
        (["--sft..max_steps=5"], "--sft..max_steps: a setting is named as --key or --section.key"),
        (
            ["--max_steps.x", "5"],
            "--max_steps.x: sft.max_steps: expected a whole number or null, got a",
        ),
        (["--seed.x", "5"], "--seed.x: seed is 42 and has no keys"),
        (["--data.0.rows", "5"], "--data.0.rows: sft.data.0 is 'identity' and has no keys"),
        (
            ["--data.1", "x"],
            "--data.1: sft.data is a list of 1; '1' is no position in it (the first is 0)",
        ),
        (["--data.²", "x"], "--data.²: sft.data is a list of 1; '²' is no position in it"),
        (["--data.-1", "x"], "--data.-1: sft.data is a list of 1; '-1' is no position in it"),
        (
            ["--data", "[]"],
            "--data: sft.data: expected a list of sources, such as [{path: identity}]",
        ),
        (["--device_batch_size", "0"], "0 is not possible: it must be at least 1"),
        (["--trust_remote_code=x"], "--trust_remote_code: takes no value, got 'x'"),
        (
            ["--sft.trust_remote_code=true"],
            "only the command line may say it (--trust_remote_code)",
        ),
        (["--hub_token", "x"], "--hub_token: cannot be set: tokens are kept in no file"),
        (["--deepspeed", "x"], "--deepspeed: cannot be set: choose it with `accelerate launch"),
        (["--name", "../x"], "--name: name: '../x' cannot be a folder's name"),
        (["--mid.max_steps", "5"], "--mid.max_steps: mid: needs data, such as [{path: identity}]"),
        (["--" + "a." * 3000 + "a", "5"], "a setting is named as --key or --section.key"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else None,
)
def test_broken_command_line(argv, said):
    assert said in message(SFT, *argv)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--max_steps", "5"], "--max_steps: of which stage? Say --sft.max_steps"),
        (["--lora.r", "5"], "--lora.r: of which stage? Say --sft.lora.r"),
        (["--device_batch_size", "2"], "of which stage? Say --sft.device_batch_size"),
        (["--zebra", "5"], "--zebra: unknown key 'zebra'"),
        (["--hub_token", "x"], "--hub_token: cannot be set: tokens are kept in no file"),
    ],
)
def test_broken_command_line_of_a_whole_run(argv, said):
    assert said in message(SFT, *argv, stage=None)


@pytest.mark.parametrize(
    ("given", "stage", "said"),
    [
        ([], "sft", "which recipe? For example: hfsft sft recipes/demo.yaml"),
        (["--max_steps", "5"], "mid", "which recipe? For example: hfsft mid recipes/demo.yaml"),
        (
            ["none.yaml"],
            None,
            "no recipe 'none.yaml': no such file, and those that come with hfsft are ",
        ),
        (["fats"], None, "; did you mean 'fast'?"),
        (["x" * 5000], None, "no recipe 'xxx"),
        (["."], None, ". is a folder; give a recipe file, such as recipes/demo.yaml"),
        (["elsewhere/demo.yaml"], None, "no recipe 'elsewhere/demo.yaml': no such file"),
        (["fast"], "mid", "has no mid section; it has sft"),
    ],
)
def test_broken_recipe_name(given, stage, said):
    with pytest.raises(RecipeError) as refused:
        load_recipe(*given, stage=stage)
    assert said in str(refused.value)


# --- what they say right ---


def test_precedence():
    """Defaults, then what is extended, the recipe, and the command line on top."""
    Path("parent.yaml").write_text(SFT + "  learning_rate: 1e-4\n  weight_decay: 0.3\n")
    child = "extends: parent.yaml\nsft:\n  learning_rate: 2e-4\n"

    def rate(text: str, *argv: str) -> float:
        return load(text, *argv).sft.trainer["learning_rate"]

    assert rate(SFT) == 2e-5
    assert rate("extends: parent.yaml\n") == 1e-4
    assert rate(child) == 2e-4
    assert rate(child, "--learning_rate", "3e-4") == 3e-4
    assert load(child).sft.trainer["weight_decay"] == 0.3


def test_extends_merges_mappings_and_replaces_the_rest():
    Path("grandparent.yaml").write_text(
        "name: old\nsft:\n  data: [{path: a, rows: 3}, b]\n  lora: {r: 4, lora_alpha: 8}\n"
        "  memory_limit: 8GB\n  lr_scheduler_kwargs: {a: 1}\n"
    )
    Path("parent.yaml").write_text("extends: grandparent.yaml\nname: new\nsft: {max_steps: 9}\n")
    recipe = load(
        "extends: parent.yaml\n"
        "sft: {data: [c], lora: {r: 16}, memory_limit: null, lr_scheduler_kwargs: null}\n"
    )
    assert recipe.name == "new"
    assert [source.path for source in recipe.sft.data] == ["c"]
    assert recipe.sft.lora == {"r": 16, "lora_alpha": 8}
    assert recipe.sft.max_steps == 9
    assert recipe.sft.memory_limit is None
    assert recipe.sft.trainer["lr_scheduler_kwargs"] is None
    assert load("extends: parent.yaml\nsft: {lora: null}\n").sft.lora is None


@pytest.mark.parametrize("given", ["fast", "fast.yaml", "recipes/fast.yaml"])
def test_extends_and_commands_find_what_comes_with_hfsft(given):
    assert load(f"extends: {given}\nname: mine\n").sft.max_steps == 200
    assert load_recipe(given).name == "fast"


def test_merge_keys_and_aliases():
    recipe = load(
        "sft:\n  <<: &common {max_steps: 7, max_length: 64}\n  data: [x]\n"
        "  lora: &lora {<<: {r: 4, bias: all}, r: 8}\n"
        "mid:\n  <<: *common\n  max_steps: 9\n  data: [x]\n  lora: *lora\n"
    )
    assert (recipe.sft.max_steps, recipe.mid.max_steps, recipe.mid.max_length) == (7, 9, 64)
    assert recipe.sft.lora == recipe.mid.lora == {"r": 8, "bias": "all"}


@pytest.mark.parametrize(
    ("alias", "value", "key"),
    [
        ("device_batch_size", 4, "per_device_train_batch_size"),
        ("target_examples_per_step", 64, "examples_per_step"),
        ("max_tokens", 512, "max_length"),
        ("num_iterations", 7, "max_steps"),
        ("eval_every", 50, "eval_steps"),
    ],
)
def test_every_alias_in_every_form(alias, value, key):
    for argv in (
        [f"--{alias}", f"{value}"],
        [f"--{alias}={value}"],
        [f"--sft.{alias}", f"{value}"],
    ):
        stage = load(SFT, *argv).sft
        assert (stage.trainer.get(key) or getattr(stage, key)) == value
    assert load(SFT, f"--sft.{alias}={value}", stage=None).sft == stage


@pytest.mark.parametrize("argv", [["--eval_every=-1"], ["--eval_every", "-1"], ["--eval_steps=-1"]])
def test_eval_every_minus_one_means_no_validation(argv):
    stage = load(SFT, *argv).sft
    assert not stage.validates
    assert stage.trainer["eval_strategy"] == "no"
    assert "eval_steps" not in stage.trainer
    assert load(SFT).sft.validates
    assert not load(SFT + "  held_out: 0\n").sft.validates


def test_scalars_are_what_they_look_like():
    """As in YAML 1.2: `1e-3` is a number, `no` and a date are text, `010` is ten."""
    recipe = load(
        SFT + "  learning_rate: 1e-3\n  eval_strategy: no\n  max_steps: 010\n  revision: 1e-3\n"
        "  bf16: off\nname: 2024-01-01\nsample_prompts: [no, on]\n"
    )
    assert recipe.sft.trainer["learning_rate"] == 0.001
    assert recipe.sft.trainer["eval_strategy"] == "no"
    assert recipe.sft.trainer["bf16"] is False
    assert recipe.sft.max_steps == 10
    assert recipe.sft.revision == "1e-3"
    assert recipe.name == "2024-01-01"
    assert recipe.sample_prompts == ["no", "on"]


def test_dotted_paths():
    text = (
        "sft:\n  model_name_or_path: model\n  data: [{path: a, rows: 3}, b]\n"
        "  lora: null\n  lr_scheduler_kwargs: {num_cycles: 2}\n"
    )
    recipe = load(
        text,
        *("--sft.data.0.rows", "5"),
        *("--data.1", "{path: c, first: true}"),
        *("--lora.r", "8"),
        *("--lora.target_modules", "[q_proj, v_proj]"),
        *("--lr_scheduler_kwargs.num_cycles", "3"),
        *("--sample_prompts.0", "Hi"),
        *("--output_dir", "elsewhere"),
    )
    first, second = recipe.sft.data
    assert (first.path, first.rows) == ("a", 5)
    assert (second.path, second.first) == ("c", True)
    assert recipe.sft.lora == {"r": 8, "target_modules": ["q_proj", "v_proj"]}
    assert recipe.sft.trainer["lr_scheduler_kwargs"] == {"num_cycles": 3}
    assert recipe.sample_prompts[0] == "Hi"
    assert len(recipe.sample_prompts) == 3
    assert recipe.sft.folder == Path("elsewhere/r/sft")


def test_bare_flags_are_true():
    argv = (
        "--bf16",
        "--load_in_4bit",
        "--lora.r",
        "8",
        "--tokenizer.train",
        "--restart",
        "--quiet",
    )
    recipe = load(SFT, *argv)
    assert recipe.sft.trainer["bf16"] is True
    assert recipe.sft.load_in_4bit
    assert recipe.tokenizer == {"train": True}
    assert (recipe.restart, recipe.quiet, recipe.sft.quiet) == (True, True, True)
    assert not recipe.trust_remote_code
    assert load(SFT, "--trust_remote_code").sft.trust_remote_code
    assert not load(SFT, "--trust_remote_code=false").sft.trust_remote_code


def test_epochs_take_the_place_of_the_default_steps():
    stage = load(SFT, "--num_train_epochs", "2").sft
    assert (stage.max_steps, stage.trainer["num_train_epochs"]) == (None, 2.0)


@pytest.mark.parametrize(("limit", "size"), [("8GB", 8 * 10**9), ("7.5 GiB", 7.5 * 2**30)])
def test_memory_limit(limit, size):
    assert load(SFT + f"  memory_limit: {limit}\n").sft.memory_limit_bytes == size


def test_auto_values():
    keys = ("per_device_train_batch_size", "gradient_checkpointing", "optim")
    text = SFT + "".join(f"  {key}: auto\n" for key in keys)
    recipe = load(text)
    settled = [recipe.sft.trainer[key] for key in (keys[0], "activation_checkpointing", keys[2])]
    assert settled == ["auto"] * 3
    assert recipe.resolved["sft"]["optim"] == "auto"
    assert load(SFT, "--device_batch_size", "auto").sft.trainer[keys[0]] == "auto"
    assert "expected a whole number, got 'many'" in message(SFT + f"  {keys[0]}: many\n")
    assert "expected a number, got 'auto'" in message(SFT + "  learning_rate: auto\n")
    said = message(MID + f"  {keys[0]}: auto\n", stage="mid")
    assert said.startswith(f"r.yaml:4: mid.{keys[0]}: auto needs tokens_per_step")
    text = MID + f"  {keys[0]}: auto\n  tokens_per_step: 2048\n"
    assert load(text, stage="mid").mid.tokens_per_step == 2048


def test_a_plan_can_be_ignored():
    assert load(SFT, "--ignore_plan").ignore_plan
    assert not load(SFT).ignore_plan


def test_a_renamed_run_starts_from_the_recipes_own_stage():
    """`hfsft sft r.yaml --name faster` needs no second base and mid."""
    text = BASE.replace("64", "1024") + MID + "sft:\n  data: [identity]\nname: first\n"
    for stage in ("base", "mid"):
        Path("runs/first", stage).mkdir(parents=True)
        Path("runs/first", stage, "config.json").write_text("{}")
    assert load(text).sft.model_name_or_path == "runs/first/mid"
    renamed = load(text, "--name", "faster")
    assert renamed.sft.folder == Path("runs/faster/sft")
    assert renamed.sft.model_name_or_path == "runs/first/mid"
    assert reloaded(renamed).stages == renamed.stages
    Path("runs/faster/mid").mkdir(parents=True)
    Path("runs/faster/mid/config.json").write_text("{}")
    assert load(text, "--name", "faster").sft.model_name_or_path == "runs/faster/mid"


# --- the files in recipes/ ---


def reloaded(recipe: Recipe) -> Recipe:
    """The recipe as the run's own copy of it gives it."""
    copy = Path(recipe.output_dir, recipe.name, "recipe.yaml")
    copy.parent.mkdir(parents=True, exist_ok=True)
    copy.write_text(yaml.safe_dump(recipe.resolved, sort_keys=False, allow_unicode=True))
    return load_recipe(str(copy))


@each_recipe
def test_recipe_loads_and_its_resolved_copy_is_the_same(path):
    recipe = load_recipe(str(path))
    assert recipe.name == path.stem
    assert set(recipe.stages) == set(yaml.safe_load(path.read_text())) & set(STAGES)
    copy = reloaded(recipe)
    for name in ("name", "output_dir", "seed", "model", "tokenizer", "sample_prompts", "stages"):
        assert getattr(copy, name) == getattr(recipe, name), name
    assert copy.resolved == recipe.resolved


def test_resolved_copy_holds_the_command_line():
    argv = (
        "--eval_every=-1",
        "--lora.r",
        "8",
        "--num_train_epochs=2",
        "--revision=010",
        "--name=on",
    )
    recipe = load(SFT + "tokenizer: gpt2\n", *argv, "--gradient_checkpointing", "no")
    copy = reloaded(recipe)
    assert copy.stages == recipe.stages
    assert copy.tokenizer == recipe.tokenizer == {"path": "gpt2"}
    assert (copy.name, copy.sft.revision, copy.sft.validates) == ("on", "010", False)


def test_fast_is_the_reference_run():
    stage = load_recipe("fast").sft
    assert (stage.max_steps, stage.examples_per_step, stage.max_length) == (200, 32, 1024)
    assert stage.trainer["per_device_train_batch_size"] == 2
    assert stage.trainer["optim"] == "adamw_bnb_8bit"
    assert stage.trainer["activation_checkpointing"] is True
    assert stage.held_out == 500
    assert stage.assistant_only_loss
    assert stage.lora is None


@each_recipe
def test_recipe_opens_with_command_hardware_time_memory_and_score(path):
    header = re.match(r"(#.*\n)+", path.read_text()).group()
    assert re.search(rf"^#   (accelerate launch|hfsft) .*recipes/{path.name}$", header, re.M)
    for word in ("hardware", "time", "memory", "score"):
        assert re.search(rf"^# {word}\b +\S", header, re.M), word


def test_loading_imports_nothing_heavy():
    code = (
        "import sys; from hfsft.recipe.loading import load_recipe; load_recipe('nanochat-d8'); "
        "load_recipe('qlora-1b', '--max_steps=3', stage='sft'); print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"torch", "transformers", "trl", "peft", "accelerate", "datasets", "numpy"}
    assert heavy & set(done.stdout.split()) == set()

"""Loading recipes: inheritance, the command line, defaults, and the files in recipes/."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from recipe_texts import BASE, MID, SFT, load, message

from hfsft.errors import RecipeError
from hfsft.recipe.key import AUTO, STAGES
from hfsft.recipe.loading import load_recipe
from hfsft.recipe.schema import Recipe

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))

each_recipe = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)

# --- inheritance ---

EXTENDS = [
    ("extends: none.yaml\n", "r.yaml:1: extends: no such file 'none.yaml'"),
    (
        "extends: /nowhere/fast.yaml\n",
        "r.yaml:1: extends: no such file '/nowhere/fast.yaml'; did you mean",
    ),
    ("extends: .\n", "r.yaml:1: extends: '.' is a folder, not a recipe"),
    ("extends: r.yaml\n", "r.yaml:1: extends: circular, since r.yaml extends this file"),
    ("extends: loop.yaml\n", "loop.yaml:1: extends: circular, since r.yaml extends this file"),
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


@pytest.mark.parametrize(("text", "expected"), EXTENDS, ids=lambda value: repr(value)[-50:])
def test_broken_inheritance(text, expected):
    Path("loop.yaml").write_text("extends: r.yaml\n")
    Path("parent.yaml").write_text("sft:\n  max_step: 3\n")
    assert expected in message(text)


# --- the command line: errors ---


@pytest.mark.parametrize(
    ("argv", "expected"),
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
        (["--lora.r=5", "--lora={r: 4}"], "--lora: would overwrite --lora.r; put --lora before it"),
        (["--restart", "--restart"], "--restart: given twice"),
        (["--restart", "maybe"], "--restart: takes no value, got 'maybe'"),
        (["--lora", "{r: 4, r: 5}"], "--lora: 'r' is given twice, first at --lora"),
        (["--lora.r", "-8"], "--lora.r: sft.lora.r: -8 is not possible: it must be at least 1"),
        (["--sft..max_steps=5"], "--sft..max_steps: write settings as --key or --section.key"),
        (
            ["--max_steps.x", "5"],
            "--max_steps.x: sft.max_steps: expected a whole number or null, got a",
        ),
        (["--seed.x", "5"], "--seed.x: seed is 42 and has no keys"),
        (["--data.0.rows", "5"], "--data.0.rows: sft.data.0 is 'identity' and has no keys"),
        (
            ["--data.1", "x"],
            "--data.1: sft.data is a list of 1; '1' is not an index into it (the first is 0)",
        ),
        (["--data.²", "x"], "--data.²: sft.data is a list of 1; '²' is not an index into it"),
        (["--data.-1", "x"], "--data.-1: sft.data is a list of 1; '-1' is not an index into it"),
        (
            ["--data", "[]"],
            "--data: sft.data: expected a list of sources, such as [{path: identity}]",
        ),
        (["--device_batch_size", "0"], "0 is not possible: it must be at least 1"),
        (["--trust_remote_code=x"], "--trust_remote_code: takes no value, got 'x'"),
        (
            ["--sft.trust_remote_code=true"],
            "can only be set on the command line (--trust_remote_code)",
        ),
        (["--hub_token", "x"], "--hub_token: cannot be set: tokens are stored in no file"),
        (["--deepspeed", "x"], "--deepspeed: cannot be set: choose it with `accelerate launch"),
        (["--name", "../x"], "--name: name: '../x' is not a valid folder name"),
        (["--mid.max_steps", "5"], "--mid.max_steps: mid: needs data, such as [{path: identity}]"),
        (["--" + "a." * 3000 + "a", "5"], "write settings as --key or --section.key"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else None,
)
def test_broken_command_line(argv, expected):
    assert expected in message(SFT, *argv)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--max_steps", "5"], "--max_steps: of which stage? Say --sft.max_steps"),
        (["--lora.r", "5"], "--lora.r: of which stage? Say --sft.lora.r"),
        (["--device_batch_size", "2"], "of which stage? Say --sft.device_batch_size"),
        (["--zebra", "5"], "--zebra: unknown key 'zebra'"),
        (["--hub_token", "x"], "--hub_token: cannot be set: tokens are stored in no file"),
    ],
)
def test_broken_command_line_of_a_whole_run(argv, expected):
    assert expected in message(SFT, *argv, stage=None)


@pytest.mark.parametrize(
    ("given", "stage", "expected"),
    [
        ([], "sft", "which recipe? For example: hfsft sft recipes/demo.yaml"),
        (["--max_steps", "5"], "mid", "which recipe? For example: hfsft mid recipes/demo.yaml"),
        (
            ["none.yaml"],
            None,
            "no recipe 'none.yaml': no such file; the built-in recipes are ",
        ),
        (["fats"], None, "; did you mean 'fast'?"),
        (["x" * 5000], None, "no recipe 'xxx"),
        (["."], None, ". is a folder; give a recipe file, such as recipes/demo.yaml"),
        (["fast", "--restrat"], "sft", "'restrat' in sft; did you mean 'restart'?"),
        (["fast", "--nmae", "x"], "sft", "'nmae' in sft; did you mean 'name'?"),
        (["elsewhere/demo.yaml"], None, "no recipe 'elsewhere/demo.yaml': no such file"),
        (["fast"], "mid", "has no mid section; it has sft"),
    ],
)
def test_broken_recipe_name(given, stage, expected):
    with pytest.raises(RecipeError) as refused:
        load_recipe(*given, stage=stage)
    assert expected in str(refused.value)


def test_the_folder_of_a_run_has_its_recipe(tmp_path):
    (tmp_path / "run" / "sft").mkdir(parents=True)
    (tmp_path / "run" / "recipe.yaml").write_text(SFT)
    for folder in (tmp_path / "run", tmp_path / "run" / "sft"):
        with pytest.raises(RecipeError, match=r"for this run .*run/recipe\.yaml"):
            load_recipe(str(folder), stage="sft")


# --- what a recipe resolves to ---


def test_precedence():
    """Defaults < the recipe that is extended < the recipe < the command line."""
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
def test_extends_and_commands_find_built_in_recipes(given):
    assert load(f"extends: {given}\nname: mine\n").sft.max_steps == 200
    assert load_recipe(given).name == "fast"


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


def test_epochs_replace_the_default_max_steps():
    stage = load(SFT, "--num_train_epochs", "2").sft
    assert (stage.max_steps, stage.trainer["num_train_epochs"]) == (None, 2.0)


@pytest.mark.parametrize(("limit", "size"), [("8GB", 8 * 10**9), ("7.5 GiB", 7.5 * 2**30)])
def test_memory_limit(limit, size):
    assert load(SFT + f"  memory_limit: {limit}\n").sft.memory_limit_bytes == size


def test_auto_values():
    keys = ("per_device_train_batch_size", "gradient_checkpointing", "optim")
    text = SFT + "".join(f"  {key}: auto\n" for key in keys)
    recipe = load(text)
    chosen = [recipe.sft.trainer[key] for key in (keys[0], "activation_checkpointing", keys[2])]
    assert chosen == ["auto"] * 3
    assert recipe.resolved["sft"]["optim"] == "auto"
    assert load(SFT, "--device_batch_size", "auto").sft.trainer[keys[0]] == "auto"
    assert "expected a whole number, got 'many'" in message(SFT + f"  {keys[0]}: many\n")
    assert "expected a number, got 'auto'" in message(SFT + "  learning_rate: auto\n")
    shown = message(MID + f"  {keys[0]}: auto\n", stage="mid")
    assert shown.startswith(f"r.yaml:4: mid.{keys[0]}: auto needs tokens_per_step")
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
    """The recipe, loaded from the run's copy of it."""
    copy = Path(recipe.output_dir, recipe.name, "recipe.yaml")
    copy.parent.mkdir(parents=True, exist_ok=True)
    copy.write_text(yaml.safe_dump(recipe.resolved, sort_keys=False, allow_unicode=True))
    return load_recipe(str(copy))


@each_recipe
def test_recipe_loads_and_its_resolved_copy_is_the_same(path):
    recipe = load_recipe(str(path))
    assert recipe.name == path.stem
    written = yaml.safe_load(path.read_text())  # the others are those of the recipe it extends
    assert set(written) & set(STAGES) <= set(recipe.stages)
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
    assert stage.trainer["per_device_train_batch_size"] == AUTO
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

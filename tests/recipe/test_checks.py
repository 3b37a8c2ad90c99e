"""What is refused in a recipe, and the message that names the place and the fix."""

import pytest
from recipe_texts import BASE, MID, SFT, load, message

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
        "r.yaml:4: unknown key 'zebra' in sft; neither hfsft nor trl.SFTConfig has it",
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
        "r.yaml:4: unknown key 'restart'; it is a command-line flag (--restart",
    ),
    (
        SFT + "  replay: {path: small_talk, shares: 1}\n",
        "r.yaml:4: unknown key 'shares' in sft.replay; did you mean 'share'?",
    ),
    (SFT + "  replay: {share: 0.2}\n", "r.yaml:4: sft.replay: a source needs a path"),
    (
        SFT + "  replay: {path: small_talk, share: 1}\n",
        "r.yaml:4: sft.replay.share: 1 is not possible: it must be at most 0.9",
    ),
    (SFT + "  replay: {path: small_talk, weight: 2}\n", "r.yaml:4: unknown key 'weight' in sft"),
    (SFT + "  lora: {rank: 8}\n", "r.yaml:4: unknown key 'rank' in sft.lora; did you mean 'r'?"),
    (SFT + "model: {dept: 8}\n", "r.yaml:4: unknown key 'dept' in model; did you mean 'depth'?"),
    (
        SFT + "model: {depth: 8, hidden_size: 9}\n",
        "unknown key 'hidden_size' in model; known keys are ",
    ),
    (
        SFT + "tokenizer: {trian: true}\n",
        "r.yaml:4: unknown key 'trian' in tokenizer; did you mean",
    ),
    (
        "sft: {data: [{path: x, row: 3}]}\n",
        "r.yaml:1: unknown key 'row' in sft.data.0; did you mean",
    ),
    (
        '"\\e[31m\\n": 3\n',
        r"r.yaml:1: unknown key '\x1b[31m\n'; known keys are base, generation, mid, model, name",
    ),
    (
        "5: 3\n",
        "r.yaml:1: unknown key '5'; known keys are base, generation, mid, model, name, output_dir, "
        "sample_p",
    ),
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
    (SFT + "  learning_rate: '1e-3'\n", "expected a number, got '1e-3' (remove the quotes)"),
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
        "sft.held_out: 1.5 is not possible: below 1 it is a share, from 1 on a",
    ),
    (
        SFT + "  eval_steps: 0\n",
        "sft.eval_steps: expected a number above 0, or -1 for no validation",
    ),
    (
        SFT + "  optim: adamw\n",
        "sft.optim: 'adamw' is not one of its 42 choices; did you mean 'adamw_",
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
    (SFT + "name: ../x\n", "r.yaml:4: name: '../x' is not a valid folder name"),
    (SFT + "name: a/b\n", "r.yaml:4: name: 'a/b' is not a valid folder name"),
    (SFT + 'name: "a\\nb"\n', r"r.yaml:4: name: 'a\nb' is not a valid folder name"),
    (SFT + f"name: {'x' * 300}\n", "...' is not a valid folder name"),
    (SFT + 'output_dir: "a\\0b"\n', r"r.yaml:4: output_dir: 'a\x00b' contains a NUL character"),
    (SFT + "output_dir: ''\n", "r.yaml:4: output_dir: must not be empty"),
    (
        SFT + "model: {depth: 0}\n",
        "r.yaml:4: model.depth: 0 is not possible: it must be at least 1",
    ),
    (
        SFT + "model: {model_type: lama}\n",
        "transformers has no model type 'lama'; did you mean 'llama'?",
    ),
    (
        SFT + "model: {model_type: /etc}\n",
        "r.yaml:4: model.model_type: transformers has no model type '/etc'",
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
        "r.yaml:4: sft.trust_remote_code: can only be set on the command",
    ),
    (
        SFT + "trust_remote_code: true\n",
        "r.yaml:4: trust_remote_code: can only be set on the command",
    ),
    (
        "sft: {data: [{path: x, trust_remote_code: true}]}\n",
        "r.yaml:1: sft.data.0.trust_remote_code: can only be set on the",
    ),
    (
        SFT + "  hub_token: hf_x\n",
        "sft.hub_token cannot be set: tokens are stored in no file: run `hf auth",
    ),
    (
        SFT + "hub_token: hf_x\n",
        "r.yaml:4: hub_token cannot be set: tokens are stored in no file: run `hf",
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
    (
        SFT + "  pad_to_multiple_of: 8\n",
        "r.yaml:4: sft.pad_to_multiple_of cannot be set: a row is as long as the step's conv",
    ),
    (
        SFT + "  truncation_mode: keep_end\n",
        "r.yaml:4: sft.truncation_mode: 'keep_end' is not one of keep_start",
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
        "r.yaml:2: sft.data.0: format text is for base; sft trains on con",
    ),
    (
        "\n  - x\n  - {path: y, streaming: true}",
        "r.yaml:4: sft.data.1: streaming is for base text; sft",
    ),
]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *UNKNOWN,
        *WRONG_TYPES,
        *IMPOSSIBLE,
        *CONFLICTS,
        *NOT_HERE,
        *((f"sft:\n  data: {data}\n", expected) for data, expected in DATA),
    ],
    ids=lambda value: repr(value)[-50:],
)
def test_broken_recipe(text, expected):
    assert expected in message(text)


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
    (BASE + "  replay: {path: x}\n", "r.yaml:6: unknown key 'replay' in base; it belongs in mid"),
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
        "r.yaml:4: base.data.0: x is streamed, and takes no rows, first, repeat or weight",
    ),
]


@pytest.mark.parametrize(
    ("text", "expected"), BROKEN_BASE, ids=[expected[:40] for _, expected in BROKEN_BASE]
)
def test_broken_base_or_mid(text, expected):
    assert expected in message(text, stage=None)


def test_sft_starts_from_base_where_there_is_no_mid():
    sft = "sft:\n  data: [identity]\n  max_length: 64\n"
    assert load(BASE + sft).sft.model_name_or_path == "runs/r/base"
    assert load(BASE + MID + "  max_length: 64\n" + sft).sft.model_name_or_path == "runs/r/mid"
    assert load(sft).sft.model_name_or_path == "runs/r/mid"  # of an earlier run of that name
    named = sft + "  model_name_or_path: elsewhere\n"
    assert load(BASE + named).sft.model_name_or_path == "elsewhere"


def test_muon_and_its_settings():
    muon = load(BASE + "  optim: muon\n  muon: {momentum: 0.9}\n", stage="base").base
    assert muon.trainer["optim"] == "muon" and muon.muon == {"momentum": 0.9}
    said = message(BASE + "  muon: {momentum: 0.9}\n", stage="base")
    assert "base.muon: is for optim: muon, and optim is adamw_torch_fused" in said
    said = message(BASE + "  optim: muon\n  muon: {momentun: 0.9}\n", stage="base")
    assert "did you mean 'momentum'" in said
    said = message(SFT + "  optim: muon\n  lora: {r: 4}\n")
    assert "sft.optim: muon trains whole matrices" in said


@pytest.mark.parametrize("optim", ["lomo", "adalomo", "apollo_adamw_layerwise"])
def test_an_update_within_the_backward_pass_is_refused(optim):
    assert "in the backward pass of each micro-batch" in message(SFT + f"  optim: {optim}\n")


def test_tokens_per_parameter_set_the_steps_alone():
    base = BASE.replace("max_steps: 3", "tokens_per_parameter: 20")
    assert "needs tokens_per_step" in message(base, stage="base")
    base += "  tokens_per_step: auto\n"
    stage = load(base, stage="base").base
    assert (stage.tokens_per_parameter, stage.tokens_per_step, stage.max_steps) == (
        20.0,
        "auto",
        None,
    )
    assert "max_steps is given as well" in message(base + "  max_steps: 3\n", stage="base")
    both = base + "  tokens_per_scaling_parameter: 12\n"
    assert "tokens_per_scaling_parameter is given as well" in message(both, stage="base")
    assert "auto is for base" in message(MID + "  tokens_per_step: auto\n", stage="mid")

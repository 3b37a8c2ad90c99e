"""Reading YAML: broken files, tags and bombs, and what scalars, aliases and merge keys mean."""

import pytest
from recipe_texts import SFT, load, message

FILES = [
    ("", "r.yaml: the file is empty; see recipes/demo.yaml for a complete one"),
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
    ("sft:\n  lora: &a\n    r: *a\n", "nested more than 50 deep; does an alias contain itself?"),
    ("sft: &a\n  <<: *a\n", "r.yaml:2: nested more than 50 deep; does an alias contain itself?"),
    ("a: " + "[" * 3000, "r.yaml: nested more than 50 deep"),
    (SFT + "  <<: 5\n", "r.yaml:4: << takes a mapping, got 5"),
    (
        SFT + "  max_steps: !!python/object/apply:os.getcwd []\n",
        "r.yaml:4: remove the tag !!python/obj",
    ),
    (SFT + "  max_steps: !!float ''\n", "r.yaml:4: remove the tag !!float"),
    ("sft: !!set {data}\n", "r.yaml:1: remove the tag !!set"),
]


@pytest.mark.parametrize(("text", "expected"), FILES, ids=lambda value: repr(value)[-50:])
def test_broken_file(text, expected):
    assert expected in message(text)


BOMBS = {
    "aliases": "a: &a0 [x, x]\n"
    + "".join(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10)),
    "merges": "a: &a0 {k: 1}\n"
    + "".join(f"a{i}: &a{i} {{<<: [{','.join([f'*a{i - 1}'] * 10)}]}}\n" for i in range(1, 10)),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_nested_aliases_are_limited(bomb):
    assert message(BOMBS[bomb]) == "r.yaml: more than 100,000 values; are its aliases nested?"


def test_scalars_are_yaml_1_2():
    """`1e-3` is a number, `no` and a date are text, `010` is ten."""
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


def test_merge_keys_and_aliases():
    recipe = load(
        "sft:\n  <<: &common {max_steps: 7, max_length: 64}\n  data: [x]\n"
        "  lora: &lora {<<: {r: 4, bias: all}, r: 8}\n"
        "mid:\n  <<: *common\n  max_steps: 9\n  data: [x]\n  lora: *lora\n"
    )
    assert (recipe.sft.max_steps, recipe.mid.max_steps, recipe.mid.max_length) == (7, 9, 64)
    assert recipe.sft.lora == recipe.mid.lora == {"r": 8, "bias": "all"}

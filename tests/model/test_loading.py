"""Fresh models with nanochat's initialisation, loaded ones, and LoRA."""

import json
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM, NanoChatForCausalLM

from hfsft.errors import ModelError, RecipeError
from hfsft.model.loading import build_model, load_model, merged_model, nanochat_config
from hfsft.recipe.loading import load_recipe
from hfsft.recipe.schema import Recipe, Stage
from hfsft.tokens.tokenizer import load_tokenizer


@pytest.fixture(scope="module", autouse=True)
def no_progress_bars():
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


@pytest.fixture
def make_recipe(tmp_path):
    """Makes a recipe that builds this model."""

    def make(model: dict, seed: int = 42) -> Recipe:
        recipe = {
            "seed": seed,
            "model": model,
            "tokenizer": {"path": "none"},
            "base": {"data": [{"path": "facts"}], "max_steps": 1},
        }
        path = tmp_path / "r.yaml"
        path.write_text(yaml.safe_dump(recipe))
        return load_recipe(str(path))

    return make


LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
TOKENS = torch.tensor([[0, 1, 40, 50, 60, 2, 3]])


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits


# --- fresh ---


def test_depth_8_has_92_million_parameters():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(nanochat_config(8, vocab_size=65536))
    assert sum(parameter.numel() for parameter in model.parameters()) == 92_274_688
    config = model.config
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (
        512,
        2048,
        8,
    )
    assert config.hidden_size // config.num_attention_heads == 128
    assert config.num_key_value_heads == config.num_attention_heads == 4


@pytest.mark.parametrize(("depth", "heads"), [(1, 1), (2, 1), (3, 3), (4, 2), (20, 10)])
def test_heads_of_a_depth(depth, heads):
    config = nanochat_config(depth)
    assert (config.hidden_size, config.num_attention_heads) == (64 * depth, heads)


def test_a_depth_builds_a_nanochat_model(make_recipe, tokenizer):
    model = build_model(
        make_recipe({"depth": 2, "vocab_size": 600, "max_position_embeddings": 96}), tokenizer
    )
    assert isinstance(model, NanoChatForCausalLM)
    assert sum(parameter.numel() for parameter in model.parameters()) == (
        2 * 600 * 128 + 2 * (4 * 128 * 128 + 2 * 128 * 512)
    )
    config, generation = model.config, model.generation_config
    assert (config.vocab_size, config.max_position_embeddings) == (600, 96)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (0, 4, 9)
    assert (generation.eos_token_id, generation.pad_token_id) == (4, 9)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_the_vocabulary_is_the_tokenizer_s_unless_given(make_recipe, tokenizer):
    assert build_model(make_recipe({"depth": 1}), tokenizer).config.vocab_size == 512


def test_nanochat_initialisation(make_recipe, tokenizer):
    settings = {
        "model_type": "nanochat",
        "vocab_size": 2048,
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
    }
    model = build_model(make_recipe(settings), tokenizer)
    expected = {
        "embed_tokens": 1.0,
        "q_proj": 256**-0.5,
        "k_proj": 256**-0.5 * (64 / 256) ** 0.5,  # narrower out than in
        "v_proj": 256**-0.5 * (64 / 256) ** 0.5,
        "fc1": 256**-0.5,
        "o_proj": 0.0,
        "fc2": 0.0,
        "lm_head": 0.0,
    }
    seen = set()
    for name, parameter in model.named_parameters():
        group = name.removesuffix(".weight").rsplit(".", 1)[-1]
        seen.add(group)
        if expected[group] == 0:
            assert not parameter.any()
        else:
            assert parameter.std().item() == pytest.approx(expected[group], rel=0.03)
            assert abs(parameter.mean().item()) < 0.03 * expected[group]
    assert seen == set(expected)
    assert not logits(model).any()  # so that the first loss is ln(vocabulary)


def test_the_seed_decides_the_weights(make_recipe, tokenizer):
    first, again, other = (
        build_model(make_recipe({"depth": 2}, seed), tokenizer).state_dict() for seed in (1, 1, 2)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_a_model_type_is_built_from_its_config_s_keys(make_recipe, tokenizer):
    model = build_model(
        make_recipe(LLAMA | {"num_key_value_heads": 1, "attn_implementation": "eager"}), tokenizer
    )
    assert isinstance(model, LlamaForCausalLM)
    assert model.config._attn_implementation == "eager"
    assert model.config.num_key_value_heads == 1
    assert sum(parameter.numel() for parameter in model.parameters()) == (
        2 * 512 * 64 + 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128 + 2 * 64) + 64
    )
    assert logits(model).std() > 0.01


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (
            {"depth": 2, "vocab_size": 300},
            "model.vocab_size: 300 does not hold the tokenizer's 512",
        ),
        (LLAMA | {"num_attention_heads": 3}, "hidden size (64) is not a multiple of the number of"),
        (LLAMA | {"num_key_value_heads": 3}, "num_key_value_heads: 3 does not divide the 2 atten"),
        (
            LLAMA | {"hidden_size": 6},
            "2 heads share a hidden_size of 6, 3 each; it must be an even",
        ),
        (LLAMA | {"hidden_act": "rleu"}, "model: transformers knows no 'rleu'"),
        (LLAMA | {"initializer_range": -1.0}, "initializer_range"),
        (LLAMA | {"pad_token_id": 5}, "model.pad_token_id: the tokenizer gives it; leave it out"),
        (LLAMA | {"attn_implementation": "flash_attention_2"}, "FlashAttention2"),
        ({"model_type": "clip"}, "Unrecognized configuration class"),
        (
            {"model_type": "nanochat", "hidden_size": 64, "num_attention_heads": 3},
            "3 heads share a hidden_size of 64, 21.3333 each; it must be an even number",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_an_error(model, says, make_recipe, tokenizer):
    recipe = make_recipe(model)
    with pytest.raises(RecipeError) as error:
        build_model(recipe, tokenizer)
    assert says in str(error.value)
    assert str(error.value).startswith(f"{recipe.path}: model")
    assert len(str(error.value).splitlines()) <= 2


# --- loaded ---


@pytest.fixture
def folder(make_model, tmp_path) -> Path:
    """A saved Llama of 512 tokens and 256 positions."""
    make_model("llama").save_pretrained(tmp_path / "start")
    return tmp_path / "start"


@pytest.fixture
def make_start(make_stage, folder):
    """Makes a stage that starts from the saved Llama."""

    def make(**settings) -> Stage:
        return make_stage("identity", **{"model_name_or_path": str(folder), **settings})

    return make


def change_config(folder: Path, **settings) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def test_a_model_is_loaded_as_it_was_saved(make_start, make_model, folder, tokenizer):
    model = load_model(make_start(), tokenizer)
    assert isinstance(model, LlamaForCausalLM)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    torch.testing.assert_close(logits(model), logits(make_model("llama")), atol=0, rtol=0)
    assert (model.config.eos_token_id, model.config.pad_token_id) == (4, 9)
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (4, 9)
    half = load_model(make_start(dtype="bfloat16", attn_implementation="eager"), tokenizer)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert half.config._attn_implementation == "eager"


def test_weights_in_16_bits_are_trained_in_32(make_start, make_model, tokenizer, tmp_path):
    make_model("llama").to(torch.bfloat16).save_pretrained(tmp_path / "half")
    model = load_model(make_start(model_name_or_path=str(tmp_path / "half")), tokenizer)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_tied_embeddings_are_not_missing(make_start, make_model, tokenizer, tmp_path):
    make_model("llama", tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    assert "lm_head.weight" not in load_file(tmp_path / "tied" / "model.safetensors")
    model = load_model(make_start(model_name_or_path=str(tmp_path / "tied")), tokenizer)
    assert model.lm_head.weight is model.get_input_embeddings().weight


def cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


BROKEN = {
    "no config": (
        lambda folder: (folder / "config.json").unlink(),
        " holds no model (no config.json)",
    ),
    "config cut": (
        lambda folder: cut_in_half(folder / "config.json"),
        ": its config.json is not a JSON object",
    ),
    "no weights": (
        lambda folder: (folder / "model.safetensors").unlink(),
        ": cannot be loaded: Error no file named model.safetensors",
    ),
    "weights cut": (
        lambda folder: cut_in_half(folder / "model.safetensors"),
        ": its weights cannot be read: Error while deserializing header",
    ),
    "weights empty": (
        lambda folder: (folder / "model.safetensors").write_bytes(b""),
        ": its weights cannot be read: Error while deserializing header",
    ),
    "weights of other shapes": (
        lambda folder: change_config(folder, intermediate_size=64),
        ": its weights have other shapes than its config.json",
    ),
    "a layer lacking": (
        lambda folder: change_config(folder, num_hidden_layers=3),
        ": its weights lack 9 tensors that its config.json asks for, such as model.layers.2.",
    ),
    "heads that do not fit": (
        lambda folder: change_config(folder, num_attention_heads=3),
        ": cannot be loaded: config.json: Class validation error",
    ),
    "unknown type": (
        lambda folder: change_config(folder, model_type="llamma"),
        ": cannot be loaded: The checkpoint you are trying to load has model type `llamma`",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_model_is_an_error_that_names_it(case, make_start, folder, tokenizer):
    harm, says = BROKEN[case]
    harm(folder)
    with pytest.raises(ModelError) as error:
        load_model(make_start(), tokenizer)
    assert str(error.value).startswith(f"{folder}{says}")
    assert len(str(error.value).splitlines()) == 1


def test_a_missing_model_is_an_error(make_start, tokenizer, tmp_path):
    with pytest.raises(ModelError, match=r"^/nowhere/at/all: no such folder$"):
        load_model(make_start(model_name_or_path="/nowhere/at/all"), tokenizer)
    with pytest.raises(ModelError) as error:
        load_model(make_start(model_name_or_path=str(tmp_path / "run" / "mid")), tokenizer)
    assert str(error.value) == (
        f"{tmp_path}/run/mid does not exist\n"
        "  Train it first with `hfsft mid RECIPE`, or start from another model: "
        "--model_name_or_path FOLDER_OR_HUB_ID"
    )


def test_max_length_above_the_positions_is_an_error(make_start, folder, tokenizer):
    load_model(make_start(max_length=256), tokenizer)
    with pytest.raises(ModelError) as error:
        load_model(make_start(max_length=257), tokenizer)
    assert str(error.value) == (
        f"sft.max_length: 257 is more than the 256 positions of {folder}; set it to at most that"
    )


@pytest.fixture
def larger(tokenizer, tmp_path):
    """The tokenizer with ChatML's two tokens more."""
    tokenizer.save_pretrained(tmp_path / "larger")
    return load_tokenizer(str(tmp_path / "larger"), chat_template="chatml")


def test_embeddings_grow_with_the_tokenizer(make_start, folder, larger):
    torch.manual_seed(1)
    model = load_model(make_start(), larger)
    torch.manual_seed(2)  # the stage's seed alone decides
    again = load_model(make_start(), larger)
    before = load_file(folder / "model.safetensors")
    for name, weight in (
        ("model.embed_tokens.weight", model.get_input_embeddings().weight),
        ("lm_head.weight", model.get_output_embeddings().weight),
    ):
        assert weight.shape == (514, 64)
        assert torch.equal(weight[:512], before[name])
        assert weight[512:].norm() < 0.2 * weight[:2].norm()  # at the mean of all
        assert torch.equal(weight, again.state_dict()[name])
    assert model.config.vocab_size == 514
    assert model.config.eos_token_id == larger.convert_tokens_to_ids("<|im_end|>") == 513


# --- LoRA ---


def test_lora_trains_the_adapter_alone_and_merges_into_the_same_model(make_start, tokenizer):
    stage = make_start(lora={"r": 4, "lora_alpha": 8})
    plain = logits(load_model(make_start(), tokenizer))
    model = load_model(stage, tokenizer)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_A" in name or "lora_B" in name for name in trained)
    # two layers of four 64 by 64 and three 64 by 128 matrices; lm_head has no adapter
    assert sum(p.numel() for p in trained.values()) == 2 * 4 * (4 * 128 + 3 * 192)
    torch.testing.assert_close(logits(model), plain, atol=0, rtol=0)
    again = dict(load_model(stage, tokenizer).named_parameters())
    assert all(torch.equal(p, again[name]) for name, p in trained.items())

    model.train()(input_ids=TOKENS, labels=TOKENS).loss.backward()
    frozen = {name for name, p in model.named_parameters() if p.grad is None}
    assert frozen == {name for name, _ in model.named_parameters()} - set(trained)
    with torch.no_grad():
        for name, parameter in trained.items():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    expected = logits(model)
    assert (expected - plain).abs().max() > 0.1
    merged = merged_model(Path("unused"), stage, model)
    assert isinstance(merged, LlamaForCausalLM)
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=1e-5)
    assert not any("lora" in name for name, _ in merged.named_parameters())


def test_lora_cannot_learn_new_tokens_unless_told(make_start, folder, larger):
    with pytest.raises(ModelError) as error:
        load_model(make_start(lora={"r": 4}), larger)
    assert str(error.value) == (
        f"{folder} lacks 2 chat tokens, which LoRA alone cannot learn\n"
        "  Add lora: {modules_to_save: [embed_tokens, lm_head]}, or start from a chat model"
    )
    saved = {"r": 4, "modules_to_save": ["embed_tokens", "lm_head"]}
    model = load_model(make_start(lora=saved), larger)
    trained = [
        name for name, p in model.named_parameters() if p.requires_grad and "lora" not in name
    ]
    assert sorted(trained) == [
        "base_model.model.lm_head.modules_to_save.default.weight",
        "base_model.model.model.embed_tokens.modules_to_save.default.weight",
    ]


def test_merged_into_a_reloaded_base_it_is_the_same_model(make_start, larger, tmp_path):
    """As where weights are sharded; with embeddings that the base does not have."""
    lora = {"r": 4, "modules_to_save": ["embed_tokens", "lm_head"]}
    model = load_model(stage := make_start(lora=lora), larger)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(tmp_path / "adapter")
    reloaded = merged_model(tmp_path / "adapter", stage, model, sharded=True)
    merged = merged_model(tmp_path / "adapter", stage, model)
    expected, found = merged.state_dict(), reloaded.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert reloaded.config.to_dict() == merged.config.to_dict()


@pytest.mark.parametrize(
    ("lora", "says"),
    [
        (
            {"target_modules": ["nonsense"]},
            "Target modules {'nonsense'} not found in the base model",
        ),
        ({"r": 0}, "`r` should be a positive integer value but the value passed is 0"),
        ({"bias": "some"}, "Requested bias: some, is not implemented"),
    ],
)
def test_lora_that_cannot_be_is_an_error(lora, says, make_start, tokenizer):
    with pytest.raises(RecipeError) as error:
        load_model(make_start(lora=lora), tokenizer)
    assert str(error.value).startswith(f"sft.lora: {says}")
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU can do it")
def test_4_bits_need_a_gpu(make_start, tokenizer):
    with pytest.raises(RecipeError) as error:
        load_model(make_start(lora={"r": 4}, load_in_4bit=True), tokenizer)
    assert str(error.value) == (
        "sft.load_in_4bit: QLoRA needs a CUDA GPU, and none is here; "
        "--load_in_4bit false trains LoRA on full weights"
    )


# --- hostile folders ---


def altered(folder: Path, make_model, tokenizer, **keys) -> str:
    """A model's folder with other values in its config.json."""
    make_model("llama").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text()) | keys
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"num_attention_heads": 0}, "config.json: num_attention_heads is '0', no whole number"),
        ({"num_key_value_heads": 0}, "config.json: num_key_value_heads is '0', no whole number"),
        ({"hidden_size": "64"}, "config.json: hidden_size is '64', no whole number above 0"),
        ({"hidden_size": -64}, "config.json: hidden_size is '-64', no whole number above 0"),
        ({"vocab_size": 512.0}, "config.json: vocab_size is '512.0', no whole number above 0"),
        ({"num_hidden_layers": 10**6}, "config.json: num_hidden_layers is 1,000,000, above 1,000"),
        ({"num_labels": 10**9}, "config.json: num_labels is 1,000,000,000, above 10,000"),
        ({"text_config": {"num_hidden_layers": 10**6}}, "num_hidden_layers is 1,000,000, above"),
        ({"pad_token_id": 10**9}, "cannot be loaded: "),
        ({"num_attention_heads": 3}, ""),
        ({"hidden_act": "no such"}, "cannot be loaded: "),
        ({"rms_norm_eps": "x"}, ""),
        ({"rms_norm_eps": -1e9}, "makes a model whose outputs are no numbers"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": "x"}}, ""),
        ({"vocab_size": 10**12}, ""),
        ({"head_dim": 7}, ""),
        ({"model_type": ["llama"]}, ""),
    ],
    ids=str,
)
def test_a_hostile_config_is_one_error(tmp_path, make_model, tokenizer, keys, message):
    folder = altered(tmp_path / "model", make_model, tokenizer, **keys)
    stage = Stage("sft", tmp_path, 0, [], 0, model_name_or_path=folder, max_length=64)
    with pytest.raises(ModelError) as caught:
        load_model(stage, load_tokenizer(folder))
    assert str(caught.value).startswith(f"{folder}: ") and message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("text", ["[]", "3", "{", "", "[" * 100_000])
def test_a_config_that_is_no_object_is_one_error(tmp_path, make_model, tokenizer, text):
    folder = altered(tmp_path / "model", make_model, tokenizer)
    (tmp_path / "model" / "config.json").write_text(text)
    stage = Stage("sft", tmp_path, 0, [], 0, model_name_or_path=folder, max_length=64)
    with pytest.raises(ModelError, match=r"config\.json is not a JSON object"):
        load_model(stage, tokenizer)

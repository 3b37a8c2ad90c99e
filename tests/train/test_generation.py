"""How a finished model says it wants to be sampled; models of plain architectures from scratch."""

import json
from pathlib import Path

import pytest
import yaml
from recipe_texts import SFT, message
from transformers import AutoModelForCausalLM, GenerationConfig, pipeline

from hfsft import base, mid, sft
from hfsft.export.export import export_model
from hfsft.train.generation import write_generation_config

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 400,
    "max_position_embeddings": 96,
}
STAGES = {
    "base": {
        "data": [{"path": "facts", "rows": 200}],
        "held_out": 0,
        "max_length": 64,
        "tokens_per_step": 512,
        "max_steps": 3,
    },
    "mid": {
        "data": [{"path": "small_talk", "rows": 40}],
        "held_out": 0,
        "max_length": 64,
        "tokens_per_step": 512,
        "max_steps": 2,
    },
    "sft": {
        "data": [{"path": "simple_spelling", "rows": 60}],
        "held_out": 8,
        "examples_per_step": 4,
        "max_length": 64,
        "max_steps": 2,
        "lora": {"r": 4},
    },
}


def settings(folder: Path) -> dict:
    held = json.loads((folder / "generation_config.json").read_text())
    return {key: value for key, value in held.items() if key != "transformers_version"}


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ({}, {"do_sample": True, "temperature": 0.6, "top_k": 50, "max_new_tokens": 128}),
        (
            {"temperature": 0.9, "top_p": 0.95, "max_new_tokens": 7},
            {
                "do_sample": True,
                "temperature": 0.9,
                "top_k": 50,
                "top_p": 0.95,
                "max_new_tokens": 7,
            },
        ),
        ({"do_sample": False}, {"do_sample": False, "max_new_tokens": 128}),
    ],
)
def test_the_file_holds_the_recipes_settings_and_the_end_tokens(
    tmp_path, make_model, make_stage, tokenizer, chosen, expected
):
    config = make_model("llama").config
    write_generation_config(tmp_path, make_stage(generation=chosen), config, tokenizer)
    ids = {"bos_token_id": 0, "eos_token_id": [4, 0], "pad_token_id": 9}
    assert settings(tmp_path) == expected | ids
    GenerationConfig.from_pretrained(tmp_path).validate(strict=True)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("generation: {temprature: 1}", "unknown key 'temprature' in generation; did you mean"),
        ("generation: {temperature: 0}", "generation.temperature: 0 is not possible: it must be"),
        ("generation: {top_k: 2.5}", "generation.top_k: expected a whole number, got 2.5"),
        ("tokenizer: {pre_tokenizer: gpt2}", "'gpt2' is not one of qwen2, llama-bpe, nanochat"),
    ],
)
def test_a_mistake_names_its_line(tmp_path, monkeypatch, line, problem):
    monkeypatch.chdir(tmp_path)
    assert message(SFT + line + "\n").startswith("r.yaml:4: ")
    assert problem in message(SFT + line + "\n")


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_a_plain_architecture_from_scratch_needs_no_export(tmp_path, model_type):
    """All three stages, the last with LoRA: the folders load in stock transformers, and in GGUF."""
    model = SHAPE | {"model_type": model_type} | ({"head_dim": 32} if model_type == "qwen3" else {})
    recipe = {"name": "plain", "output_dir": str(tmp_path), "model": model, **STAGES}
    recipe |= {"tokenizer": {"train": True}, "generation": {"temperature": 0.5}}
    path = tmp_path / "plain.yaml"
    path.write_text(yaml.safe_dump(recipe))
    for stage in (base, mid, sft):
        stage.main(str(path), "--quiet")
        folder = tmp_path / "plain" / stage.__name__.rpartition(".")[2]
        assert AutoModelForCausalLM.from_pretrained(folder).config.model_type == model_type
        assert settings(folder)["temperature"] == 0.5
        assert settings(folder)["max_new_tokens"] == 48
    chat = pipeline("text-generation", model=str(folder))
    (answer,) = chat([{"role": "user", "content": "Hi"}], max_new_tokens=4)
    assert answer["generated_text"][-1]["role"] == "assistant"
    (proof,) = export_model(str(tmp_path / "plain"), "gguf", ["f32"], say=lambda line: None)
    assert proof["file"] == "plain-sft-F32.gguf" and proof["cap"] is None
    assert proof["documents"] == "8 held-out conversations of the run"
    # an export with an answer that differs other than by a tie is refused
    assert proof["answers"] == 12 and proof["tie"] <= 0.01

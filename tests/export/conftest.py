"""What the tests of exports share: tiny models of each kind in folders, with a tokenizer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    GenerationConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

QWEN = {"qwen2": (Qwen2Config, Qwen2ForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}


@pytest.fixture(autouse=True)
def short_proofs(monkeypatch):
    """Shorter answers and fewer documents: every proof asks each of its questions nevertheless."""
    monkeypatch.setattr("hfsft.export.reference.ANSWER_TOKENS", 8)
    monkeypatch.setattr("hfsft.export.reference.DOCUMENTS", 2)


@pytest.fixture(scope="session")
def save_model(make_model, tokenizer, tmp_path_factory) -> Callable[..., Path]:
    """Saves a random model of a kind with the nanochat tokenizer; returns its folder."""

    def save(kind: str = "nanochat", **settings: Any) -> Path:
        folder = tmp_path_factory.mktemp(kind) / "model"
        if kind in QWEN:
            model = random_qwen(*QWEN[kind], **settings)
        else:
            model = make_model(kind, **settings)
        model.generation_config = GenerationConfig(
            do_sample=True, temperature=0.6, top_k=50, max_new_tokens=64, eos_token_id=[4, 0]
        )
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return save


def random_qwen(config_class: type, model_class: type, **settings: Any) -> Any:
    """A Qwen model, 64 wide with two layers, biases and norms included, none of them plain."""
    torch.manual_seed(0)
    config = config_class(
        **{
            "vocab_size": 512,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "bos_token_id": 0,
            "eos_token_id": 4,
            "pad_token_id": 9,
            **settings,
        }
    )
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=0.2)
    return model

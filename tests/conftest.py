"""What several test files share: a tokenizer trained on the spot, tiny models, and stages."""

import gc
import os
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

# set before `datasets` is imported: no test reads a cache that another run left
os.environ.setdefault("HF_DATASETS_CACHE", tempfile.mkdtemp(prefix="hfsft-tests-"))

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, NanoChatConfig, NanoChatForCausalLM

from hfsft.data.tasks import facts
from hfsft.process import STOPPING
from hfsft.recipe.schema import Source, Stage
from hfsft.tokens.tokenizer import train_tokenizer

VOCAB_SIZE = 512

# a shell's background job is started to ignore it, and so would be what the tests start
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config):
    """Hide a GPU from the tests that assert figures of the CPU; `make test-gpu` shows it."""
    if config.getoption("-m") != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(autouse=True)
def signals_as_before(monkeypatch):
    """Puts back what a command that ends leaves as it is: it ends with its process elsewhere."""
    monkeypatch.setattr("hfsft.process.PATIENCE", 1e6)
    before = {number: signal.getsignal(number) for number in STOPPING}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    signal.set_wakeup_fd(-1)
    gc.enable()  # `run_main` leaves it off


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """A nanochat tokenizer of 512 tokens, trained on the embedded facts in half a second."""
    return train_tokenizer(facts(), VOCAB_SIZE)


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Any]:
    """Makes a `nanochat` or `llama` model, 64 wide with two layers, no weight of which is zero."""

    def make(model_type: str = "nanochat", attention: str = "sdpa", **settings: Any) -> Any:
        config_class, model_class = {
            "nanochat": (NanoChatConfig, NanoChatForCausalLM),
            "llama": (LlamaConfig, LlamaForCausalLM),
        }[model_type]
        torch.manual_seed(0)
        config = config_class(
            **{
                "vocab_size": VOCAB_SIZE,
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "max_position_embeddings": 256,
                "bos_token_id": 0,
                "eos_token_id": 4,
                "pad_token_id": 9,
                "attn_implementation": attention,
                **settings,
            }
        )
        model = model_class(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=0.2)
        return model

    return make


@pytest.fixture
def make_stage(tmp_path) -> Callable[..., Stage]:
    """Makes a `Stage` without a recipe; a source may be given as its path alone."""

    def make(*data: Source | str, name: str = "sft", **settings: Any) -> Stage:
        return Stage(
            **{
                "name": name,
                "folder": Path(tmp_path) / name,
                "seed": 42,
                "data": [Source(source) if isinstance(source, str) else source for source in data],
                "held_out": 0,
                "max_length": 64,
                "assistant_only_loss": True,
                "trainer": {"eval_strategy": "steps"},
                "quiet": True,
                **settings,
            }
        )

    return make

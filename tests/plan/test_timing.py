"""Timed steps: every part of a real step runs; a test says nothing of how long."""

import weakref

import pytest
import torch
import yaml

from hfsft.errors import MemoryShortage, RecipeError
from hfsft.plan.choosing import with_settings
from hfsft.plan.step_memory import model_of
from hfsft.plan.timing import seconds_per_step
from hfsft.recipe.loading import load_recipe

RECIPE = {
    "model": {"depth": 2, "vocab_size": 400, "max_position_embeddings": 64},
    "tokenizer": {"train": True},
    "base": {"data": ["facts"], "max_steps": 4, "tokens_per_step": 512},
    "sft": {"model_name_or_path": "base", "data": ["identity"], "max_length": 64},
}


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(RECIPE | {"output_dir": str(tmp_path)}))
    return load_recipe(str(path))


def test_micro_batches_and_the_update_make_a_step(recipe, monkeypatch):
    shapes, updates = [], []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda self, *a: (updates.append(1), step(self, *a))
    )
    forward = torch.nn.Embedding.forward
    monkeypatch.setattr(
        torch.nn.Embedding,
        "forward",
        lambda self, ids: (shapes.append(tuple(ids.shape)), forward(self, ids))[1],
    )
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr("time.perf_counter", lambda: float(next(clock)))
    stage = with_settings(recipe.base, per_device_train_batch_size=3)
    # 8 rows of 64 in three micro-batches, each 10 / 3 s by this clock, and an update of 10 s
    assert seconds_per_step(recipe, stage) == pytest.approx(3 * 10 / 3 + 10)
    assert shapes == [(3, 64)] * 4 and len(updates) == 2


@pytest.mark.parametrize("settings", [{}, {"lora": {"r": 4}}, {"optim": "adamw_torch"}])
def test_settings_of_a_stage_are_timed(recipe, settings):
    assert seconds_per_step(recipe, with_settings(recipe.sft, **settings)) > 0


def test_4bit_weights_are_not_timed(recipe):
    with pytest.raises(RecipeError, match="4-bit weights cannot be timed"):
        seconds_per_step(recipe, with_settings(recipe.sft, load_in_4bit=True))


def test_the_timed_model_is_the_one_that_trains(recipe, tmp_path, monkeypatch, make_model):
    """Float32 weights of a checkpoint in bfloat16, its attention, its checkpointing arguments."""
    make_model("llama").to(torch.bfloat16).save_pretrained(tmp_path / "half")
    stage = with_settings(
        recipe.sft,
        model_name_or_path=str(tmp_path / "half"),
        attn_implementation="eager",
        gradient_checkpointing=True,
        activation_checkpointing_kwargs={"use_reentrant": True},
    )
    built = []
    monkeypatch.setattr(
        "hfsft.plan.timing.model_of", lambda *a: built.append(model_of(*a)) or built[-1]
    )
    assert seconds_per_step(recipe, stage) > 0
    ((model, fused),) = built
    assert fused and model.dtype == torch.float32
    assert model.config._attn_implementation == "eager"
    layer = model.model.layers[0]
    assert layer.gradient_checkpointing
    assert layer._gradient_checkpointing_func.keywords == {"use_reentrant": True}


def test_an_optimizer_that_cannot_be_built_is_an_error(recipe):
    stage = with_settings(recipe.sft, optim="galore_adamw")
    with pytest.raises(RecipeError, match=r"sft.optim: galore_adamw cannot be built before a run"):
        seconds_per_step(recipe, stage)


def test_compiled_layers_are_timed(recipe, monkeypatch):
    compiled = []
    compile_layer = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module,
        "compile",
        lambda self, **k: (compiled.append(self), compile_layer(self, backend="eager", **k)),
    )
    assert seconds_per_step(recipe, with_settings(recipe.base, torch_compile=True)) > 0
    assert len(compiled) == 2


def test_a_compiler_that_fails_is_an_error_of_the_recipe(recipe):
    missing = torch._inductor.config.patch({"cpp.cxx": (None, "/nowhere/g++")})
    with missing, torch.compiler.config.patch(force_disable_caches=True):
        torch._dynamo.reset()
        with pytest.raises(RecipeError, match=r"^base\.torch_compile: InvalidCxxCompiler"):
            seconds_per_step(recipe, with_settings(recipe.base, torch_compile=True))


def test_an_optimizer_that_is_not_installed_is_named(recipe, monkeypatch):
    monkeypatch.setattr("hfsft.model.optimizer.find_spec", lambda name: None)
    stage = with_settings(recipe.sft, optim="adamw_torch_8bit", dtype="bfloat16")
    with pytest.raises(RecipeError, match=r"sft\.optim: adamw_torch_8bit needs torchao: pip"):
        seconds_per_step(recipe, stage)


def test_memory_that_runs_out_is_one_message(recipe, monkeypatch):
    def runs_out(self, *args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(torch.optim.AdamW, "step", runs_out)
    with pytest.raises(MemoryShortage, match=r"^base: out of memory while its step is timed: CUDA"):
        seconds_per_step(recipe, recipe.base)


def test_a_timed_model_is_not_kept(recipe, monkeypatch):
    kept = []

    def build(*args):
        model, fused = model_of(*args)
        kept.append(weakref.ref(model))
        return model, fused

    monkeypatch.setattr("hfsft.plan.timing.model_of", build)
    seconds_per_step(recipe, recipe.base)
    assert [reference() for reference in kept] == [None]


def test_a_model_without_a_fused_head_is_timed_with_its_own_attention(recipe, monkeypatch):
    built = []

    def build(*args):
        monkeypatch.setattr("hfsft.plan.step_memory.fuse_head", lambda *a: False)
        built.append(model_of(*args))
        return built[-1]

    monkeypatch.setattr("hfsft.plan.timing.model_of", build)
    assert seconds_per_step(recipe, recipe.base) > 0
    ((model, fused),) = built
    assert not fused and model.config._attn_implementation == "sdpa"

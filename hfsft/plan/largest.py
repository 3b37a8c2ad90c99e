"""The largest model that a stage trains within some memory: in full, by LoRA, by QLoRA."""

import tempfile
from pathlib import Path
from typing import Any

from transformers import LlamaConfig

from hfsft.errors import RecipeError
from hfsft.model.optimizer import FOR_BFLOAT16
from hfsft.plan.choosing import LORA, as_flags, with_settings
from hfsft.plan.plan import Plan, plan_stage
from hfsft.recipe.schema import LOADING, Recipe, Stage

# the proportions of SmolLM2-1.7B, which has 24 layers of width 2,048
HEAD, WIDTH_OF_A_LAYER, MLP, VOCABULARY = 64, 85, 4, 49_152
WIDTHS = range(256, 16_385, 128)
ADAPTER = {"optim": "adamw_torch_fused", "lora": LORA}
# what is tried: its name, and the settings that make it
METHODS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("full", {"dtype": None, "optim": "adamw_bnb_8bit", "lora": None, "load_in_4bit": False}),
    *(
        ("full", {"dtype": "bfloat16", "optim": optim, "lora": None, "load_in_4bit": False})
        for optim in FOR_BFLOAT16
    ),
    ("LoRA", {"dtype": "bfloat16", **ADAPTER, "load_in_4bit": False}),
    ("QLoRA", {"dtype": None, **ADAPTER, "load_in_4bit": True}),
)


def largest_models(recipe: Recipe, memory: int) -> list[dict[str, Any]]:
    """The largest model of SmolLM2-1.7B's proportions that each way of training fits.

    Args:
        recipe: its sft stage, or else its mid stage, gives the length of a row and all else; rows
            go one by one, with activation checkpointing.
        memory: bytes of a CUDA card.

    Returns:
        For each way: `method`, `settings` as flags, `parameters`, `width`, `layers` and `peak`; the
        last four are None where not even the smallest fits.

    Raises:
        RecipeError: if the recipe has no stage that loads a model.
    """
    stage = next((recipe.stages[name] for name in reversed(LOADING) if name in recipe.stages), None)
    if stage is None:
        raise RecipeError(f"{recipe.path}: --largest plans sft or mid, and it has neither")
    stage = with_settings(
        stage, per_device_train_batch_size=1, activation_checkpointing=True, revision=None
    )
    found = []
    near = WIDTHS[len(WIDTHS) // 8]
    with tempfile.TemporaryDirectory() as folder:
        for method, settings in METHODS:
            changed = with_settings(stage, **settings)
            width, plan = _largest_width(recipe, changed, memory, Path(folder), near)
            near = width or near  # the methods are in the order of what they reach
            shown = {key: value for key, value in settings.items() if value}
            found.append(
                {
                    "method": method,
                    "settings": as_flags(shown),
                    "parameters": plan and plan.parameters,
                    "width": width,
                    "layers": width and _layers(width),
                    "peak": plan and plan.peak,
                }
            )
    return found


def _largest_width(
    recipe: Recipe, stage: Stage, memory: int, folder: Path, near: int
) -> tuple[int | None, Plan | None]:
    """The largest width that fits, and its plan; None twice if none does.

    A plan takes 2 to 5 seconds, so few are made: first of the width `near`, then of the one whose
    memory would be right if it grew with the parameters.
    """
    best: tuple[int | None, Plan | None] = None, None
    low, high, guess = -1, len(WIDTHS), WIDTHS.index(near)  # fits, does not fit
    while high - low > 1:
        guess = min(max(guess, low + 1), high - 1)
        width = WIDTHS[guess]
        start = folder / str(width)
        if not start.is_dir():
            _config(width, stage.max_length).save_pretrained(start)
        shaped = with_settings(stage, model_name_or_path=str(start))
        plan = plan_stage(recipe, shaped, memory, "cuda")
        if plan.fits:
            low, best = guess, (width, plan)
        else:
            high = guess
        room = (memory - plan.overhead) / (plan.peak - plan.overhead)
        goal = room * _parameters(width)
        guess = sum(_parameters(other) <= goal for other in WIDTHS) - 1
    return best


def _parameters(width: int) -> int:
    """Those of `_config`, but for norms: attention takes 4 matrices, the gated MLP 3."""
    return VOCABULARY * width + _layers(width) * (4 + 3 * MLP) * width**2


def _layers(width: int) -> int:
    return round(width / WIDTH_OF_A_LAYER)


def _config(width: int, length: int | None) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=width,
        intermediate_size=MLP * width,
        num_hidden_layers=_layers(width),
        num_attention_heads=width // HEAD,
        num_key_value_heads=width // HEAD,
        vocab_size=VOCABULARY,
        max_position_embeddings=length or 2048,
        tie_word_embeddings=True,
    )

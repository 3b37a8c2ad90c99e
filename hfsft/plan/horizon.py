"""How long base trains and how large its step is, from the size of the model."""

import math
from dataclasses import replace

import torch
from transformers import AutoModelForCausalLM

from hfsft.errors import RecipeError
from hfsft.plan.plan import planned_config
from hfsft.recipe.key import AUTO
from hfsft.recipe.schema import Recipe, Stage

# karpathy/nanochat, dev/LOG.md, 2026-02-05, "Auto Batch Size Scaling": the best step of a model of
# depth 12 was measured; Bergsma et al. 2025 (arXiv 2505.13738) found the exponent
REFERENCE_TOKENS, EXPONENT = 2**19, 0.383
REFERENCE_DEPTH, REFERENCE_WIDTH = 12, 768


def with_horizon(recipe: Recipe, stage: Stage) -> Stage:
    """A stage with the `max_steps` and the `tokens_per_step` that follow from its model's size.

    Args:
        recipe: whose stage.
        stage: returned as it is without `tokens_per_step: auto`, `tokens_per_parameter` and
            `tokens_per_scaling_parameter`.

    Raises:
        RecipeError: if the model cannot be built, or the stage would have no step.
    """
    every, scaling = stage.tokens_per_parameter, stage.tokens_per_scaling_parameter
    if stage.tokens_per_step != AUTO and every is None and scaling is None:
        return stage
    parameters, scaling_parameters, vocabulary = _parameters(recipe, stage)
    if stage.tokens_per_step == AUTO:
        tokens = best_tokens_per_step(scaling_parameters, vocabulary)
        stage = replace(stage, tokens_per_step=tokens)
    if every is None and scaling is None:
        return stage
    total = scaling * scaling_parameters if every is None else every * parameters
    steps = int(total // stage.tokens_per_step)
    if steps < 1:
        raise RecipeError(
            f"{recipe.path}: {stage.name}: {total:,.0f} tokens are less than one step of "
            f"{stage.tokens_per_step:,}; lower tokens_per_step"
        )
    return replace(stage, max_steps=steps)


def best_tokens_per_step(scaling_parameters: int, vocabulary: int) -> int:
    """Tokens of a step by nanochat's rule: 2^19 at depth 12, growing with the horizon^0.383.

    The horizon is proportional to the parameters, so their ratio to those of depth 12 with the same
    vocabulary is that of the horizons.

    Args:
        scaling_parameters: of the blocks and the head.
        vocabulary: tokens.

    Returns:
        A power of two.
    """
    blocks = 12 * REFERENCE_DEPTH * REFERENCE_WIDTH**2
    ratio = scaling_parameters / (blocks + vocabulary * REFERENCE_WIDTH)
    return 2 ** round(math.log2(REFERENCE_TOKENS * ratio**EXPONENT))


def _parameters(recipe: Recipe, stage: Stage) -> tuple[int, int, int]:
    """A model's parameters, those but its untied embeddings, and its vocabulary's size."""
    config = planned_config(recipe, stage)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    looked_up = sum(
        module.weight.numel()
        for module in model.modules()
        if isinstance(module, torch.nn.Embedding)
        and (head is None or module.weight is not head.weight)
    )
    total = sum(p.numel() for p in model.parameters())
    return total, total - looked_up, config.get_text_config().vocab_size

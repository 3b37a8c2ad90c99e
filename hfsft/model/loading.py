"""The model: built from a depth or a model_type, or loaded; LoRA and QLoRA."""

import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, NanoChatConfig, NanoChatForCausalLM
from transformers.utils import cached_file

from hfsft.errors import ModelError, RecipeError, first_line
from hfsft.hub.client import NOT_LOADED, require_model, why_not_loaded
from hfsft.recipe.schema import Recipe, Stage

# else transformers asks a Hub bot to convert a repository that has pickles alone, and loads that
os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "true")


def build_model(recipe: Recipe, tokenizer: Any) -> Any:
    """Build the randomly initialised model that the base stage trains.

    Args:
        recipe: `model` holds `depth` (a NanoChat model) or `model_type` and its config's keys.
        tokenizer: gives the vocabulary's size and the special tokens' ids.

    Returns:
        A model in float32 on the CPU, seeded by the recipe's `seed`.

    Raises:
        RecipeError: if the vocabulary is smaller than the tokenizer's, or the sizes do not fit.
    """
    vocab_size = recipe.model.get("vocab_size", len(tokenizer))
    if vocab_size < len(tokenizer):
        raise RecipeError(
            f"{recipe.path}: model.vocab_size: {vocab_size:,} does not hold the tokenizer's "
            f"{len(tokenizer):,} tokens"
        )
    config = fresh_config(
        recipe,
        vocab_size,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    attention = recipe.model.get("attn_implementation")
    torch.manual_seed(recipe.seed)
    try:
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    except (ValueError, ImportError) as error:
        raise RecipeError(f"{recipe.path}: model: {first_line(error)}") from None
    except KeyError as error:  # an activation or a rope_type
        raise RecipeError(f"{recipe.path}: model: transformers knows no {error}") from None
    if isinstance(model, NanoChatForCausalLM):
        init_nanochat_weights(model)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def fresh_config(recipe: Recipe, vocab_size: int, **special: int | None) -> Any:
    """The configuration of the model that the base stage builds.

    Args:
        recipe: as `build_model` takes it.
        vocab_size: where the recipe has none.
        special: `bos_token_id`, `eos_token_id` and `pad_token_id`.

    Raises:
        RecipeError: if the sizes do not fit.
    """
    settings = {"vocab_size": vocab_size} | recipe.model
    settings.pop("attn_implementation", None)
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if key in settings:
            raise RecipeError(f"{recipe.path}: model.{key}: the tokenizer gives it; leave it out")
    if "depth" in settings:
        config = nanochat_config(settings.pop("depth"), **settings, **special)
    else:
        try:
            config = AutoConfig.for_model(settings.pop("model_type"), **settings, **special)
        except (ValueError, TypeError) as error:
            raise RecipeError(f"{recipe.path}: model: {first_line(error)}") from None
        except StrictDataclassError as error:
            raise RecipeError(f"{recipe.path}: model: {' '.join(str(error).split())}") from None
    _check_heads(config, recipe)
    return config


def _check_heads(config: Any, recipe: Recipe) -> None:
    """Refuse attention heads that would fail only in the first forward pass."""
    heads = getattr(config, "num_attention_heads", None)
    groups = getattr(config, "num_key_value_heads", None)
    if not heads or not groups:  # such as GPT-2, whose modules check it themselves
        return
    if heads % groups:
        raise RecipeError(
            f"{recipe.path}: model.num_key_value_heads: {groups} does not divide the {heads} "
            "attention heads"
        )
    width = getattr(config, "head_dim", None) or config.hidden_size / heads
    if width % 2:  # rotary embeddings rotate pairs
        raise RecipeError(
            f"{recipe.path}: model.num_attention_heads: {heads} heads share a hidden_size of "
            f"{config.hidden_size}, {width:g} each; it must be an even number"
        )


def nanochat_config(depth: int, **settings: Any) -> NanoChatConfig:
    """The shape that karpathy/nanochat gives a depth: width 64 a layer, heads of 128.

    Args:
        depth: layers; 8 with a vocabulary of 65,536 makes 92,274,688 parameters.
        settings: further fields of `NanoChatConfig`.
    """
    width = 64 * depth
    return NanoChatConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=depth,
        num_attention_heads=depth // 2 if depth % 2 == 0 else depth,  # odd depths: heads of 64
        **settings,
    )


@torch.no_grad()
def init_nanochat_weights(model: NanoChatForCausalLM) -> None:
    """Initialise as karpathy/nanochat's GPT.init_weights does, in place.

    Matrices: normal with std 1/√fan_in · min(1, √(fan_out/fan_in)); embeddings: std 1; the
    projections back into the residual stream and the head: zero, so that every layer begins as the
    identity.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=1.0)
        elif isinstance(module, nn.Linear):
            if name.endswith(("o_proj", "fc2", "lm_head")):
                nn.init.zeros_(module.weight)
            else:
                fan_out, fan_in = module.weight.shape
                std = fan_in**-0.5 * min(1.0, math.sqrt(fan_out / fan_in))
                nn.init.normal_(module.weight, std=std)


def load_model(stage: Stage, tokenizer: Any) -> Any:
    """Load the model that a stage starts from, with LoRA or QLoRA if the recipe has it.

    Args:
        stage: `model_name_or_path` is a folder or a Hub id.
        tokenizer: tokens that the model lacks are added to its embeddings, around their mean.

    Returns:
        A model in the recipe's `dtype`, by default float32: the master weights of mixed precision.
        With `lora`, a `PeftModel`.

    Raises:
        ModelError: if it cannot be loaded, or lacks positions or tokens that the stage needs.
    """
    start = stage.model_name_or_path
    quantization = _quantization(stage)
    model = load_plain_model(
        start,
        stage,
        dtype=None if quantization else stage.dtype or "float32",
        quantization_config=quantization,
    )
    size = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > size:
        # the pad token is never predicted nor attended to, so it need not be trained
        lacking = [t for t in range(size, len(tokenizer)) if t != tokenizer.pad_token_id]
        if lacking and stage.lora is not None and not stage.lora.get("modules_to_save"):
            raise ModelError(
                f"{start} lacks {len(lacking)} chat tokens, which LoRA alone cannot learn\n"
                "  Add lora: {modules_to_save: [embed_tokens, lm_head]}, or start from a chat model"
            )
        torch.manual_seed(stage.seed)  # new embeddings are drawn around the mean of the old ones
        model.resize_token_embeddings(len(tokenizer))
    positions = getattr(model.config, "max_position_embeddings", None)
    if stage.max_length and positions and stage.max_length > positions:
        raise ModelError(
            f"{stage.name}.max_length: {stage.max_length} is more than the {positions} positions "
            f"of {start}; set it to at most that"
        )
    for config in (model.config, model.generation_config):
        config.eos_token_id = tokenizer.eos_token_id
        config.pad_token_id = tokenizer.pad_token_id
    if stage.lora is None:
        return model
    return with_lora(model, stage, quantized=quantization is not None)


def plain_model(model: Any) -> Any:
    """The `PreTrainedModel`, without the `PeftModel` around it if there is one."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def load_plain_model(start: str, stage: Stage, **kwargs: Any) -> Any:
    """Load a causal language model from a folder or the Hub, from safetensors alone."""
    require_model(start, stage.revision)
    _require_safe_weights(start, stage.revision)
    try:
        model, loaded = AutoModelForCausalLM.from_pretrained(
            start,
            revision=stage.revision,
            attn_implementation=stage.attn_implementation,
            trust_remote_code=stage.trust_remote_code,
            use_safetensors=True,  # nothing downloaded is unpickled
            output_loading_info=True,
            **{key: value for key, value in kwargs.items() if value is not None},
        )
    except NOT_LOADED as error:
        raise ModelError(f"{start}: cannot be loaded: {why_not_loaded(error)}") from None
    except SafetensorError as error:
        raise ModelError(f"{start}: its weights cannot be read: {error}") from None
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise ModelError(f"{start}: cannot be loaded: {first_line(error)}") from None
        raise ModelError(f"{start}: its weights have other shapes than its config.json") from None
    if missing := sorted(
        loaded["missing_keys"]
    ):  # transformers would initialise them at random and warn
        raise ModelError(
            f"{start}: its weights lack {len(missing)} tensors that its config.json asks for, such "
            f"as {missing[0]}"
        )
    _require_forward(model, start)
    return model


@torch.no_grad()
def _require_forward(model: Any, start: str) -> None:
    """Run two tokens through a loaded model, whose config.json may make one that cannot.

    Raises:
        ModelError: if it fails, or gives what is no number though every weight is one.
    """
    if model.config._attn_implementation not in ("sdpa", "eager"):
        return  # the others may need a GPU or half precision, which it gets later
    try:
        inputs = torch.zeros((1, 2), dtype=torch.long, device=model.device)
        logits = model(input_ids=inputs).logits
    except torch.OutOfMemoryError:
        raise
    except (*NOT_LOADED, RuntimeError) as error:
        raise ModelError(
            f"{start}: its config.json makes a model that computes nothing: {first_line(error)}"
        ) from None
    if not logits.isfinite().all() and all(p.isfinite().all() for p in model.parameters()):
        raise ModelError(f"{start}: its config.json makes a model whose outputs are no numbers")


def _require_safe_weights(start: str, revision: str | None) -> None:
    """Refuse what would make transformers read other files than this model's safetensors.

    Raises:
        ModelError: if it is an adapter, or its index names pickles or files elsewhere.
    """

    def read(name: str) -> Any:
        path = cached_file(
            start,
            name,
            revision=revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        try:
            return None if path is None else json.loads(Path(path).read_text())
        except ValueError:
            raise ModelError(f"{start}: its {name} is not JSON") from None

    if (
        read("adapter_config.json") is not None
    ):  # its base model would be loaded from wherever it says
        raise ModelError(
            f"{start} is a LoRA adapter; start from the model that it was merged into, or from its "
            "base"
        )
    index = read("model.safetensors.index.json")
    files = index.get("weight_map", {}) if isinstance(index, dict) else {}
    for file in set(files.values()) if isinstance(files, dict) else ():
        if not isinstance(file, str) or "/" in file or not file.endswith(".safetensors"):
            raise ModelError(f"{start}: its weights are to be read from {file!r}, which is unsafe")


def _quantization(stage: Stage) -> Any:
    """4-bit NormalFloat with double quantisation (QLoRA, Dettmers et al. 2023), or None."""
    if not stage.load_in_4bit:
        return None
    if not torch.cuda.is_available():
        raise RecipeError(
            f"{stage.name}.load_in_4bit: QLoRA needs a CUDA GPU, and none is here; "
            "--load_in_4bit false trains LoRA on full weights"
        )
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if bf16_is_native() else torch.float16,
    )


def bf16_is_native() -> bool:
    """Whether the GPU has bfloat16 arithmetic; a T4 reports support and emulates it."""
    return torch.cuda.is_bf16_supported(including_emulation=False)


def with_lora(model: Any, stage: Stage, quantized: bool = False) -> Any:
    """Wrap a model in the recipe's LoRA adapter.

    Args:
        model: a `PreTrainedModel`.
        stage: `lora` holds fields of `peft.LoraConfig`.
        quantized: whether its weights are in 4 bits.

    Raises:
        RecipeError: if peft refuses the settings.
    """
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    if quantized:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    try:
        config = LoraConfig(
            **{"task_type": "CAUSAL_LM", "target_modules": "all-linear", **stage.lora}
        )
        torch.manual_seed(stage.seed)
        return get_peft_model(model, config)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise RecipeError(f"{stage.name}.lora: {first_line(error)}") from None


def name_base(adapter: Path, stage: Stage) -> None:
    """Name a saved adapter's base model without a path of this machine, since it may be pushed.

    Args:
        adapter: its folder.
        stage: a base on the Hub keeps its id; an earlier stage of the same run is named relative to
            the adapter, any other folder by its name after "./", which peft does not look up on
            the Hub.
    """
    start = Path(stage.model_name_or_path)
    if not start.is_dir():
        return
    beside = start.absolute().parent == stage.folder.absolute().parent
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text())
    config["base_model_name_or_path"] = (
        os.path.relpath(start, adapter) if beside else (f"./{start.name}")
    )
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def merged_model(adapter: Path, stage: Stage, model: Any, sharded: bool = False) -> Any:
    """The plain model of a LoRA run: the adapter merged into its base model.

    Args:
        adapter: the saved adapter's folder.
        stage: names the weights it started from.
        model: the trained `PeftModel`; a 4-bit base is reloaded in 16 bits, since merging into
            quantised weights would quantise the adapter as well.
        sharded: whether its weights are sharded: merging them would be a collective, so the base
            is reloaded on the rank that asks.
    """
    if not (stage.load_in_4bit or sharded):
        return model.merge_and_unload()
    from peft import PeftModel

    dtype = "bfloat16" if stage.load_in_4bit else stage.dtype or "float32"
    plain = load_plain_model(stage.model_name_or_path, stage, dtype=dtype)
    size = model.get_input_embeddings().num_embeddings
    if size != plain.get_input_embeddings().num_embeddings:
        torch.manual_seed(stage.seed)  # the new embeddings that `load_model` drew
        plain.resize_token_embeddings(size)
    for config in (plain.config, plain.generation_config):
        config.eos_token_id = model.config.eos_token_id
        config.pad_token_id = model.config.pad_token_id
    return PeftModel.from_pretrained(plain, str(adapter)).merge_and_unload()


def write_rope_theta(path: Path) -> None:
    """Repeat `rope_theta` at the top level of config.json, where older readers look for it."""
    config = json.loads(path.read_text())
    theta = (config.get("rope_parameters") or {}).get("rope_theta")
    if theta is not None and "rope_theta" not in config:
        config["rope_theta"] = theta
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")

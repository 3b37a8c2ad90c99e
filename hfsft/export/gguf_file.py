"""Write a model and its tokenizer as one GGUF file, with the `gguf` package.

What a GGUF of each architecture holds follows llama.cpp's convert_hf_to_gguf.py and its reader.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Quantization
from gguf import LlamaFileType as FileType
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from hfsft.errors import ModelError

# the types that the gguf package quantises to: the weights', the embedding's and the head's, and
# the file's. The last two keep 8 bits in files of fewer, as llama.cpp's own quantiser keeps more.
TYPES = {
    "f32": (Quantization.F32, Quantization.F32, FileType.ALL_F32),
    "f16": (Quantization.F16, Quantization.F16, FileType.MOSTLY_F16),
    "bf16": (Quantization.BF16, Quantization.BF16, FileType.MOSTLY_BF16),
    "q8_0": (Quantization.Q8_0, Quantization.Q8_0, FileType.MOSTLY_Q8_0),
    "q5_1": (Quantization.Q5_1, Quantization.Q8_0, FileType.MOSTLY_Q5_1),
    "q5_0": (Quantization.Q5_0, Quantization.Q8_0, FileType.MOSTLY_Q5_0),
    "q4_1": (Quantization.Q4_1, Quantization.Q8_0, FileType.MOSTLY_Q4_1),
    "q4_0": (Quantization.Q4_0, Quantization.Q8_0, FileType.MOSTLY_Q4_0),
}

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,  # SmolLM and SmolLM2 too
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}

LARGEST_F16 = 65504.0


def check_model(config: Any, start: str) -> None:
    """Refuse a model whose configuration a GGUF of its architecture does not express.

    Args:
        config: of a model of one of `ARCHITECTURES`.
        start: the model, for the error.

    Raises:
        ModelError: naming the setting.
    """
    rope = (config.rope_parameters or {}).get("rope_type", "default")
    problem = None
    if rope not in ("default", "linear", "llama3"):
        problem = f"rope_type: {rope}"
    elif config.hidden_act != "silu":
        problem = f"hidden_act: {config.hidden_act}"
    elif getattr(config, "use_sliding_window", False):
        problem = "use_sliding_window: true"
    elif getattr(config, "mlp_bias", False):
        problem = "mlp_bias: true"
    elif config.model_type == "qwen3" and config.attention_bias:
        problem = "attention_bias: true"
    if problem:
        raise ModelError(f"{start}: its config.json has {problem}, which hfsft cannot export")


def write_gguf(
    path: Path, model: Any, tokenizer: Any, pre_tokenizer: str, kind: str, name: str
) -> None:
    """Write a GGUF file.

    Args:
        path: the file.
        model: of one of `ARCHITECTURES`, in float32; its `generation_config` says how to sample.
        tokenizer: of the model; a byte-level BPE.
        pre_tokenizer: llama.cpp's name of how it splits text.
        kind: one of `TYPES`.
        name: the model's, for a reader to show.

    Raises:
        OSError: if the disk is full or not writable.
        ModelError: if a weight is not finite, or too large for float16.
    """
    architecture = ARCHITECTURES[model.config.model_type]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_file_type(TYPES[kind][2])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_settings(writer, model.config)
    _add_sampling(writer, model.generation_config)
    _add_tokenizer(writer, model, tokenizer, pre_tokenizer)
    tensors = dict(_tensors(model, architecture))
    for tensor_name, tensor in tensors.items():
        quantization = _quantization(tensor_name, tensor, kind)
        shape = gguf.quant_shape_to_byte_shape(tensor.shape, quantization)
        dtype = {Quantization.F32: np.float32, Quantization.F16: np.float16}.get(quantization)
        if dtype is None:
            size = int(np.prod(shape))
            writer.add_tensor_info(tensor_name, shape, np.dtype(np.uint8), size, quantization)
        else:
            size = tensor.numel() * np.dtype(dtype).itemsize
            writer.add_tensor_info(tensor_name, tuple(tensor.shape), np.dtype(dtype), size)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor_name, tensor in tensors.items():  # one at a time: the file may be large
            quantization = _quantization(tensor_name, tensor, kind)
            _check_range(tensor_name, tensor, quantization)
            writer.write_tensor_data(gguf.quantize(tensor.float().numpy(), quantization))
    finally:
        writer.close()


def _check_range(name: str, tensor: torch.Tensor, quantization: Quantization) -> None:
    largest = tensor.abs().max().item()
    if not np.isfinite(largest):
        raise ModelError(f"{name} holds weights that are not finite numbers")
    if quantization == Quantization.F16 and largest > LARGEST_F16:
        raise ModelError(f"{name} holds weights up to {largest:.3g}, too large for f16; use bf16")


def _quantization(name: str, tensor: torch.Tensor, kind: str) -> Quantization:
    """A tensor's type in a file of that kind: vectors stay in 32 bits."""
    if tensor.ndim == 1:
        return Quantization.F32
    inner, outer, _ = TYPES[kind]
    wanted = outer if name in ("token_embd.weight", "output.weight") else inner
    block, _ = gguf.GGML_QUANT_SIZES[wanted]
    return wanted if tensor.shape[-1] % block == 0 else Quantization.F16


# --- settings ---


def _add_settings(writer: gguf.GGUFWriter, config: Any) -> None:
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    rope = config.rope_parameters
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(width)
    writer.add_key_length(width)
    writer.add_value_length(width)
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def sampling_settings(generation: Any) -> dict[str, float]:
    """How a model wants to be sampled, under llama.cpp's and Ollama's names.

    What it leaves unset has the value of transformers: those two would sample with others, such as
    llama.cpp with a `min_p` of 0.05 and Ollama with a `repeat_penalty` of 1.1.
    """

    def given(value: float | None, default: float) -> float:
        return default if value is None else value

    penalty = {"repeat_penalty": given(generation.repetition_penalty, 1.0)}
    if not generation.do_sample:
        return {"temperature": 0} | penalty
    return {
        "temperature": given(generation.temperature, 1.0),
        "top_k": given(generation.top_k, 50),
        "top_p": given(generation.top_p, 1.0),
        "min_p": given(generation.min_p, 0.0),
    } | penalty


def _add_sampling(writer: gguf.GGUFWriter, generation: Any) -> None:
    """How the model wants to be sampled: llama.cpp's defaults for a request."""
    add = {
        "temperature": writer.add_sampling_temp,
        "top_k": writer.add_sampling_top_k,
        "top_p": writer.add_sampling_top_p,
        "min_p": writer.add_sampling_min_p,
        "repeat_penalty": writer.add_sampling_penalty_repeat,
    }
    for name, value in sampling_settings(generation).items():
        add[name](value)


def _add_tokenizer(writer: gguf.GGUFWriter, model: Any, tokenizer: Any, pre_tokenizer: str) -> None:
    backend, size = tokenizer.backend_tokenizer, model.config.vocab_size
    tokens = [f"[PAD{token}]" for token in range(size)]  # rows that no token has
    kinds = [gguf.TokenType.UNUSED] * size
    found = {index: (token, gguf.TokenType.NORMAL) for token, index in backend.get_vocab().items()}
    for index, added in tokenizer.added_tokens_decoder.items():
        kind = gguf.TokenType.CONTROL if added.special else gguf.TokenType.USER_DEFINED
        found[index] = added.content, kind
    for index, (token, kind) in found.items():
        if index < size:  # transformers adds a token to Qwen2's tokenizers that may have no row
            tokens[index], kinds[index] = token, kind
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(_merges(backend))
    end, *others = end_tokens(model, tokenizer)
    writer.add_eos_token_id(end)
    for other, add in zip(others, (writer.add_eot_token_id, writer.add_eom_token_id), strict=False):
        add(other)
    beginning = tokenizer.bos_token_id
    writer.add_bos_token_id(end if beginning is None else beginning)
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id < size:
        writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(adds_bos(tokenizer))
    if tokenizer.chat_template:
        writer.add_chat_template(plain_template(tokenizer.chat_template))


def adds_bos(tokenizer: Any) -> bool:
    """Whether a tokenizer puts its BOS token before a text."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a")["input_ids"][0] == bos


def _merges(backend: Any) -> list[str]:
    merges = json.loads(backend.to_str())["model"]["merges"]
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end an answer, the tokenizer's EOS token first.

    Args:
        model: its `generation_config` may have several.
        tokenizer: of the model.

    Raises:
        ModelError: if there are more than the three that a GGUF names, or none.
    """
    configured = model.generation_config.eos_token_id
    configured = configured if isinstance(configured, list) else [configured]
    found = dict.fromkeys([tokenizer.eos_token_id, *configured])
    found = [token for token in found if token is not None]
    if not 1 <= len(found) <= 3:
        raise ModelError(
            f"{tokenizer.name_or_path}: has {len(found)} end tokens; a GGUF names one to three"
        )
    return found


def plain_template(template: str) -> str:
    """A chat template without `{% generation %}` marks, which only training uses."""
    return re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", _trimming, template)


def _trimming(mark: re.Match) -> str:
    """An expression that writes nothing in a mark's place, and trims the spaces that it trimmed."""
    left = "-" if mark[0].startswith("{%-") else ""
    right = "-" if mark[0].endswith("-%}") else ""
    return f"{{{{{left} '' {right}}}}}"


# --- weights ---


def _tensors(model: Any, architecture: gguf.MODEL_ARCH) -> Iterator[tuple[str, torch.Tensor]]:
    """The model's weights under their names in a GGUF, as this architecture orders them."""
    config = model.config
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    factors = _rope_factors(config)
    if factors is not None:
        yield "rope_freqs.weight", factors
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if config.model_type == "llama" and re.search(r"[qk]_proj\.", name):
            is_query = "q_proj" in name
            heads = config.num_attention_heads if is_query else config.num_key_value_heads
            tensor = interleaved(tensor, heads)
        yield names.get_name(name, try_suffixes=(".weight", ".bias")), tensor.detach().cpu()


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of queries or keys in the order of llama.cpp's rotary embedding of Llama models.

    transformers rotates row i of a head with row i + width / 2, llama.cpp rows 2 i and 2 i + 1.
    """
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _rope_factors(config: Any) -> torch.Tensor | None:
    """What llama.cpp divides the rotary frequencies by, for Llama 3's long contexts; or None."""
    rope = config.rope_parameters
    if rope.get("rope_type") != "llama3":
        return None
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device="cpu")
    width = 2 * len(scaled)
    plain = rope["rope_theta"] ** -(torch.arange(0, width, 2) / width)
    return (plain / scaled).float()

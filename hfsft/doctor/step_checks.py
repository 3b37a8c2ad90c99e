"""Checks of a step: each runs the code that training runs beside a plain computation."""

import time
from collections.abc import Callable
from typing import Any

from hfsft.doctor.findings import CheckFailed, NotHere
from hfsft.errors import first_line

LENGTHS = (40, 17, 5, 64)  # tokens of the documents that are packed


def training_device() -> Any:
    """Where a stage would train."""
    import torch

    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def tiny_model(model_type: str = "llama", width: int = 64) -> Any:
    """A model of two layers with grouped heads, no weight of which is zero, on the device."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        model_type,
        vocab_size=512,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=4,
        pad_token_id=9,
    )
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.1)
    return model.to(training_device())


def _gradient(model: Any) -> Any:
    import torch

    return torch.cat([p.grad.flatten().float() for p in model.parameters() if p.grad is not None])


def difference(one: Any, other: Any) -> float:
    """The relative L2 difference of two tensors."""
    return float((one - other).norm() / other.norm())


def fused_head() -> str:
    """Gradients of the fused head beside those of materialised logits."""
    import torch

    from hfsft.model.head import linear_cross_entropy

    torch.manual_seed(0)
    device = training_device()
    hidden = torch.randn(300, 64, device=device, requires_grad=True)
    weight = torch.randn(512, 64, device=device, requires_grad=True)
    targets = torch.randint(512, (300,), device=device)
    results = []
    for fused in (True, False):
        hidden.grad = weight.grad = None
        if fused:
            loss = linear_cross_entropy(hidden, weight, None, targets)[0]
        else:
            logits = hidden @ weight.t()
            loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
        loss.backward()
        results.append(torch.cat([hidden.grad.flatten(), weight.grad.flatten()]))
    error = difference(*results)
    if not error < 1e-5:
        raise CheckFailed(f"gradients differ by {error:.1e}", "a bug: please report it")
    return f"gradients agree to {error:.1e}"


def packed_gradient(model: Any, packed: bool, dtype: Any) -> Any:
    """The gradient of some documents.

    Args:
        model: with a fused head, on the training device.
        packed: into one row; else each by itself.
        dtype: of autocast; float32: none.

    Returns:
        The gradients of all parameters, float32 [parameters].
    """
    import torch

    from hfsft.data.packing import StepCollator, micro_batches, model_inputs, on_device

    device = training_device()
    generator = torch.Generator().manual_seed(1)
    documents = [torch.randint(10, 512, (n,), generator=generator).tolist() for n in LENGTHS]
    step = StepCollator(9, sum(LENGTHS))([{"input_ids": ids, "labels": ids} for ids in documents])
    model.zero_grad()
    for part in micro_batches(step, 1 if packed else 0):
        inputs = on_device(model_inputs(part), device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = model(**inputs)[0]
        loss.backward()
    return _gradient(model)


def packed_attention_of_documents() -> str:
    """Gradients of packed documents beside those of each by itself, in every precision."""
    import torch

    from hfsft.model.attention import packed_attention
    from hfsft.model.head import fuse_head

    device = training_device()
    dtypes = [torch.float32, torch.bfloat16]
    if device.type == "cuda":
        dtypes.append(torch.float16)
    found = []
    for model_type in ("llama", "nanochat"):
        model = tiny_model(model_type)
        own = model.config._attn_implementation
        fuse_head(model)
        for dtype in dtypes:
            half = dtype != torch.float32
            model.set_attn_implementation(own)
            expected = packed_gradient(model, False, dtype)
            fast = packed_attention(model, device, half, sum(LENGTHS))
            model.set_attn_implementation(fast)
            error = difference(packed_gradient(model, True, dtype), expected)
            if not error < (3e-2 if half else 1e-4):
                raise CheckFailed(
                    f"{model_type}, {dtype}, {fast}: gradients differ by {error:.1e}",
                    "set attn_implementation: eager, and report it",
                )
            found.append(error)
    words = " and ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    return f"gradients of packed documents agree to {max(found):.1e} in {words}"


def eight_bit_optimizer() -> str:
    """Updates of bitsandbytes' 8-bit AdamW beside torch's."""
    import bitsandbytes
    import torch

    device, updates = training_device(), []
    for kind in (bitsandbytes.optim.AdamW8bit, torch.optim.AdamW):
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(128, 128, device=device))
        before = weight.detach().clone()
        optimizer = kind([weight], lr=1e-3, weight_decay=0.0)
        for _ in range(5):
            weight.grad = torch.randn_like(weight)
            optimizer.step()
        updates.append(weight.detach() - before)
    error = difference(*updates)
    if not error < 0.1:
        raise CheckFailed(f"updates differ by {error:.1%}", "set optim: adamw_torch_fused")
    return f"five updates within {error:.1%} of the 32-bit ones"


def activation_checkpointing() -> str:
    """Gradients with and without activation checkpointing."""
    import torch

    from hfsft.model.head import fuse_head

    model = tiny_model().train()
    fuse_head(model)
    results = []
    for on in (False, True):
        if on:
            model.activation_checkpointing_enable({"use_reentrant": False})
        results.append(packed_gradient(model, False, torch.float32))
    error = difference(*results)
    if not error < 1e-5:
        raise CheckFailed(f"gradients differ by {error:.1e}", "gradient_checkpointing: false")
    return f"gradients agree to {error:.1e}"


def compiled_layers() -> str:
    """Gradients of compiled layers beside eager ones."""
    import torch

    from hfsft.model.attention import packed_attention
    from hfsft.model.compiling import COMPILER_ADVICE, COMPILER_MISSING, compile_layers
    from hfsft.model.head import fuse_head
    from hfsft.model.loading import bf16_is_native

    model, device = tiny_model(), training_device()
    fuse_head(model)
    card, dtype = device.type == "cuda", torch.float32
    if card:  # packed rows in half precision, as it trains
        dtype = torch.bfloat16 if bf16_is_native() else torch.float16
        model.set_attn_implementation(packed_attention(model, device, True, sum(LENGTHS), True))

    def gradient() -> Any:
        return packed_gradient(model, card, dtype)

    expected, eager = gradient(), shortest(gradient)
    compile_layers(model)
    try:
        error = difference(gradient(), expected)
    except Exception as error:
        reason = first_line(error)
        if any(name in reason for name in COMPILER_MISSING):
            raise NotHere(reason) from None
        raise CheckFailed(reason, COMPILER_ADVICE.format("torch_compile")) from None
    if not error < (3e-2 if card else 1e-4):
        raise CheckFailed(f"gradients differ by {error:.1e}", "leave torch_compile out")
    milliseconds = f"{shortest(gradient) * 1e3:.1f} ms, {eager * 1e3:.1f} ms without"
    return f"gradients of compiled layers agree to {error:.1e}; a tiny model takes {milliseconds}"


def shortest(act: Callable[[], Any]) -> float:
    """The shortest of five times that something takes, in seconds."""
    import torch

    found = []
    for _ in range(5):
        began = time.perf_counter()
        act()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        found.append(time.perf_counter() - began)
    return min(found)


def rates() -> str:
    """Matrix products and copies a second."""
    import torch

    from hfsft.plan.plan import matmul_rate

    device = training_device()
    if device.type != "cuda":
        return f"float32 products: {matmul_rate('cpu', 'fp32') / 1e9:.0f} GFLOP/s"
    block = torch.empty(256 * 2**20, dtype=torch.uint8, pin_memory=True)
    on_card = block.to(device)
    copies = {"to the card": lambda: block.to(device), "on the card": lambda: on_card.clone()}
    words = [f"{matmul_rate('cuda', 'bf16') / 1e12:.0f} TFLOP/s in bfloat16"]
    for name, copy in copies.items():
        copy()
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(4):
            copy()
        torch.cuda.synchronize()
        # reads and writes
        moved = 8 if name == "on the card" else 4
        words.append(f"{moved * len(block) / (time.perf_counter() - began) / 1e9:.0f} GB/s {name}")
    return ", ".join(words)

"""The memory of a training step, traced on fake tensors: every allocation is seen, none is made.

Two depths are traced and deeper models extrapolated linearly, so that a plan takes seconds.
"""

import contextlib
import copy
import inspect
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any
from unittest.mock import patch

import torch
from accelerate import PartialState
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AutoModelForCausalLM, modeling_utils

from hfsft.model.attention import (
    DOCUMENTS,
    document_attention,
    packed_attention,
    suits_varlen,
    varlen_attention,
)
from hfsft.model.head import CHUNK_BYTES, fuse_head
from hfsft.model.loading import plain_model, with_lora
from hfsft.model.muon import muon_adamw
from hfsft.model.optimizer import optimizer_settings, state_bytes
from hfsft.recipe.key import AUTO
from hfsft.recipe.schema import MUON, Stage

KINDS = ("weights", "gradients", "optimizer", "activations", "attention", "head")


ON_HOST = "on host"  # the kind of what `offload` keeps in main memory, which is not counted


DEPTHS = (2, 3)  # layers that are traced; more are extrapolated


TRACED_CHUNKS = 8  # of the head; more rows are extrapolated as well


PLANNED = "hfsft_planned"  # the attention of a traced step


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of every live storage, by kind (weights, gradients, activations, ...).

    torch's own `MemTracker` knows no phases, and hooks every module. A storage counts as the kind
    that was current when it was allocated.
    """

    def __init__(self, unit: int):
        """Start with no storage.

        Args:
            unit: bytes to which the allocator rounds sizes up.
        """
        super().__init__()
        self.unit = unit
        self.kind, self.phase = "weights", "start"
        self.live: Counter[str] = Counter()
        self.peaks: dict[str, dict[str, int]] = {}  # phase → kind → bytes, where it was highest
        self.owners: dict[int, tuple[str, int]] = {}  # storage → kind and bytes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **kwargs or {})
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        if func is torch.ops.aten.logsumexp.default:  # it allocates exp(logits - max) internally
            self._update_peak(args[0].nbytes)
        return made

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.owners or self.kind == ON_HOST:
            return
        size = -(-storage.nbytes() // self.unit) * self.unit
        self.owners[key] = self.kind, size
        self.live[self.kind] += size
        weakref.finalize(storage, self._remove, key)
        self._update_peak()

    def _remove(self, key: int) -> None:
        kind, size = self.owners.pop(key)
        self.live[kind] -= size

    def _update_peak(self, internal: int = 0) -> None:
        highest = self.peaks.get(self.phase)
        if highest is None or sum(self.live.values()) + internal > sum(highest.values()):
            self.peaks[self.phase] = {kind: self.live[kind] for kind in KINDS}
            self.peaks[self.phase][self.kind] += internal

    def begin(self, phase: str, kind: str) -> None:
        """Enter another phase of the step; storages from here on count as `kind`."""
        self.phase, self.kind = phase, kind
        self._update_peak()

    def recount(self, tensor: torch.Tensor, kind: str) -> None:
        """Count a tensor as another kind than it was allocated as."""
        key = tensor.untyped_storage()._cdata
        old, size = self.owners[key]
        self.owners[key] = kind, size
        self.live[old] -= size
        self.live[kind] += size


class _SavedOnHost(torch.autograd.graph.saved_tensors_hooks):
    """A stand-in for torch's `save_on_cpu`: what it saves is in main memory until it is used."""

    def __init__(self, live: _LiveBytes):
        def pack(tensor: torch.Tensor) -> torch.Tensor:
            before, live.kind = live.kind, ON_HOST
            copied = torch.empty_like(tensor)
            live.kind = before
            return copied

        super().__init__(pack, torch.empty_like)


class _Ends(list):
    """A stand-in for `cu_seq_lens_q` in `document_attention`: a fake tensor has no values."""

    def diff(self) -> "_Ends":
        return self

    def tolist(self) -> list[int]:
        return list(self)


@dataclass(frozen=True)
class TracedStep:
    """All that the memory of a step depends on."""

    stage: Stage = field(compare=False)
    config: Any = field(compare=False)
    rows: int
    eval_rows: int  # of a validation's micro-batch; 0: no validation
    length: int
    cuda: bool
    half: str | None  # bfloat16 or float16: of autocast
    accumulates: bool  # the gradients of an earlier micro-batch are allocated already
    attention: str | None = None  # the recipe's attn_implementation
    settings: str = ""  # the rest as JSON, for equality

    @property
    def layers(self) -> int:
        """Layers of the whole model."""
        return self.config.get_text_config().num_hidden_layers


Peaks = dict[str, dict[str, int]]  # phase → kind → bytes


@cache
def _trace(step: TracedStep, layers: int) -> Peaks:
    """The peaks of one step of a model with `layers` layers."""
    stage = step.stage
    live = _LiveBytes(512 if step.cuda else 1)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    AttentionInterface.register(PLANNED, _attention(step, live))
    on_host = patch.object(modeling_utils, "save_on_cpu", lambda **_: _SavedOnHost(live))
    with isolated(), on_host if step.cuda else contextlib.nullcontext():
        model, fused, saved = empty_model(step, layers)
        with fake, live:
            _allocate(model)
            trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = make_optimizer(step, model)  # its lookup tables are real tensors
        with fake, live:
            live.begin("optimizer step", "gradients")
            for parameter in trained:
                parameter.grad = torch.zeros_like(parameter)
            live.kind = "optimizer"
            torch.nn.utils.clip_grad_norm_(trained, stage.trainer.get("max_grad_norm") or 1.0)
            states = _first_update(step, optimizer, model)
            if not step.accumulates:
                _drop_gradients(trained)
            for parameter in trained:
                parameter.register_post_accumulate_grad_hook(
                    lambda p: live.recount(p.grad, "gradients")
                )
            _mark_phases(model, live)
            model.train()
            live.begin("forward", "activations")
            loss = _loss(step, model, fused, step.rows)
            live.begin("head, backward", "head")
            loss.backward()
            del loss
            if step.eval_rows:
                _drop_gradients(trained)
                live.begin("validation", "activations")
                model.eval()
                with torch.no_grad():
                    _loss(step, model, fused, step.eval_rows)
    peaks = {phase: kinds for phase, kinds in live.peaks.items() if phase != "start"}
    del states
    _correct(peaks, step, optimizer, trained, saved)
    return peaks


@contextlib.contextmanager
def isolated() -> Iterator[None]:
    """Keep the random state, and ignore warnings about what a CPU cannot do."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def empty_model(step: TracedStep, layers: int) -> tuple[Any, bool, tuple[int, int]]:
    """The model of a step with `layers` layers, on the meta device.

    Returns:
        The model; whether its head is fused; the bytes that 4-bit weights save, and those of the
        largest unpacked one.
    """
    # every attention but eager is linear in memory, and so is what replaces sdpa
    own = "eager" if step.attention == "eager" else "sdpa"
    with torch.device("meta"):
        model, fused = model_of(step, layers, own)
        if packed_attention(model, torch.device("cpu"), True, step.length) == DOCUMENTS:
            model.set_attn_implementation(PLANNED)
        saved = _pack_in_4bit(model) if step.stage.load_in_4bit else (0, 0)
        if step.stage.lora is not None:
            model = with_lora(model, step.stage)
    return model, fused, saved


def model_of(step: TracedStep, layers: int, attention: str | None) -> tuple[Any, bool]:
    """A model as the stage trains it, from its configuration, on the current default device.

    Args:
        step: whose model; its LoRA adapter is not put on it yet.
        layers: how many of its layers.
        attention: its `attn_implementation`; None: transformers' default.

    Returns:
        The model, with activation checkpointing if the stage has it, and whether its head is fused.
    """
    config, stage = copy.deepcopy(step.config), step.stage
    text = config.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    name = stage.dtype or "float32"  # the master weights of mixed precision
    dtype = step.config.dtype or torch.float32 if name == AUTO else getattr(torch, name)
    model = AutoModelForCausalLM.from_config(
        config,
        dtype=torch.bfloat16 if stage.load_in_4bit else dtype,
        attn_implementation=attention,
        trust_remote_code=stage.trust_remote_code,
    )
    if uses_checkpointing(stage):  # as Trainer does
        kwargs = dict(stage.trainer.get("activation_checkpointing_kwargs") or {})
        own = {key: kwargs.pop(key) for key in ("every_n_layers", "offload") if key in kwargs}
        model.activation_checkpointing_enable(kwargs or None, **own)
    return model, fuse_head(model, stage.trainer.get("loss_type") == "dft")


def _allocate(model: Any) -> None:
    """Replace a model's meta tensors by tensors of the current mode; tied ones stay tied."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, old in tensors.items():
                if old is None:
                    continue
                if id(old) not in made:
                    new = torch.empty_like(old, device="cpu")
                    if isinstance(old, torch.nn.Parameter):
                        new = torch.nn.Parameter(new, old.requires_grad)
                    made[id(old)] = new
                tensors[name] = made[id(old)]


def _attention(step: TracedStep, live: _LiveBytes) -> Callable:
    """The attention of the device; one document a row needs the memory of many."""

    def attention(module: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        before, live.kind = live.kind, "attention"
        rows, _, length, _ = query.shape
        if step.cuda and step.half and suits_varlen(step.config):
            ends = torch.zeros(rows + 1, dtype=torch.int32)
            kwargs |= {"cu_seq_lens_q": ends, "max_length_q": length}
            made = varlen_attention(module, query, *args, **kwargs)
        else:
            kwargs["cu_seq_lens_q"] = _Ends([rows * length])
            made = document_attention(module, query, *args, **kwargs)
        live.kind = before
        return made

    return attention


def _pack_in_4bit(model: Any) -> tuple[int, int]:
    """Convert a 16-bit model to the dtypes of QLoRA; 4-bit weights by formula, as they need CUDA.

    NormalFloat with nested constants takes 4.127 bits a weight (Dettmers et al. 2023); peft keeps
    all other weights in 32 bits.
    """
    packed = {
        id(module.weight): module.weight.numel()
        for module in model.modules()
        if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings()
    }
    for parameter in model.parameters():
        if id(parameter) not in packed:
            parameter.data = parameter.data.float()
    saved = int(sum(packed.values()) * (2 - 4.127 / 8))
    return saved, 2 * max(packed.values())


def make_optimizer(step: TracedStep, model: Any) -> torch.optim.Optimizer | None:
    """The stage's optimizer, or None for one that cannot be built from its settings alone."""
    from transformers import Trainer, TrainingArguments

    settings = optimizer_settings(step.stage)
    # TrainingArguments makes Accelerate's state anew, which must stay on the stage's device
    on_cpu = PartialState().device.type == "cpu"
    args = TrainingArguments(output_dir="", use_cpu=on_cpu, **settings)
    if step.stage.trainer.get("optim") == MUON:
        return muon_adamw(model, step.stage, args)
    parameters = [p for p in model.parameters() if p.requires_grad]
    try:
        kind, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)
        if step.cuda and "fused" not in kwargs and "foreach" in inspect.signature(kind).parameters:
            kwargs["foreach"] = True  # torch's default on a GPU
        optimizer = kind(kwargs.pop("params", parameters), **kwargs)
    except (ValueError, TypeError, ImportError, RuntimeError):
        return None
    if kwargs.get("optim_bits") == 8:
        # as Trainer.create_optimizer
        for module in model.modules():
            if isinstance(module, torch.nn.Embedding) and hasattr(optimizer, "mng"):
                optimizer.mng.register_module_override(module, "weight", {"optim_bits": 32})
    return optimizer


def _first_update(step: TracedStep, optimizer: Any, model: Any) -> list[torch.Tensor]:
    """Allocate the optimizer's states by a first update; Adam's two where it cannot be traced."""
    # torchao compiles its update, and APOLLO draws random numbers: neither can be traced
    known = state_bytes(model, str(step.stage.trainer.get("optim")))
    if known is not None:
        return [torch.zeros(size, dtype=torch.uint8) for size in known.values()]
    try:
        optimizer.step()
    except Exception:  # any of 40 optimizers, or None, on fake tensors
        trained = [p for p in model.parameters() if p.requires_grad]
        return [torch.zeros(2, *parameter.shape) for parameter in trained]
    return []


def _drop_gradients(trained: list[torch.nn.Parameter]) -> None:
    for parameter in trained:
        parameter.grad = None


def _mark_phases(model: Any, live: _LiveBytes) -> None:
    """Hook the model's parts to begin a phase each, since each grows linearly by itself.

    Backward starts with most of the activations and ends with most of the gradients, which are two
    different lines.
    """
    plain = plain_model(model)

    def head_begins(module: Any, args: Any, output: Any) -> None:
        if live.phase == "forward":
            live.begin("head", "head")
            hidden = output.last_hidden_state
            if hidden.requires_grad:
                hidden.register_hook(lambda _: live.begin("norm, backward", "activations"))

    def on_gradient(phase: str) -> Callable:
        def begins(module: Any, args: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            if tensor.requires_grad:
                tensor.register_hook(lambda _: live.begin(phase, "activations"))

        return begins

    layers = plain.config.get_text_config().num_hidden_layers
    for module in plain.base_model.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == layers > 1:
            module[-1].register_forward_hook(on_gradient("last layer, backward"))
            module[-2].register_forward_hook(on_gradient("layers, backward"))
    plain.base_model.register_forward_hook(head_begins)
    plain.get_input_embeddings().register_forward_hook(on_gradient("embedding, backward"))


def _loss(step: TracedStep, model: Any, fused: bool, rows: int) -> torch.Tensor:
    """The loss of a micro-batch of full rows, every token of which is trained on."""
    length = step.length
    half = getattr(torch, step.half) if step.half else None
    plain = plain_model(model)
    ids = torch.zeros(rows, length, dtype=torch.int64)
    inputs = {"input_ids": ids, "position_ids": torch.zeros_like(ids)}
    if plain.config._attn_implementation != PLANNED:  # it separates documents by a mask
        shape = (rows, 1, length, length)
        eager = plain.config._attn_implementation == "eager"
        inputs["attention_mask"] = torch.zeros(shape, dtype=torch.float if eager else torch.bool)
    with torch.autocast("cpu", half) if half else contextlib.nullcontext():
        if not fused:
            return model(**inputs, labels=ids, use_cache=False).loss
        targets = torch.zeros(rows * (length - 1), dtype=torch.int64)
        return model(**inputs, targets=targets, target_positions=targets)[0]


def _correct(
    peaks: Peaks, step: TracedStep, optimizer: Any, trained: list[Any], saved: tuple[int, int]
) -> None:
    """Add what a trace on the CPU cannot show: 4-bit weights, paged states."""
    paged = 0
    if step.cuda and getattr(optimizer, "is_paged", False):
        paged = sum(
            value.nbytes
            for parameter, state in optimizer.state.items()
            for value in state.values()
            # bitsandbytes pages no smaller ones
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape
            if parameter.numel() >= 1e5
        )
    for phase, kinds in peaks.items():
        kinds["weights"] -= saved[0]
        kinds["optimizer"] -= paged
        if phase != "optimizer step":
            kinds["activations"] += saved[1]


def _line(low: Peaks, high: Peaks, share: float) -> Peaks:
    """Interpolate from `low` (share 0) to `high` (share 1), or extrapolate beyond it."""
    return {
        phase: {
            kind: round(low[phase][kind] + share * (high[phase][kind] - low[phase][kind]))
            for kind in KINDS
        }
        for phase in low
    }


def peaks_of(step: TracedStep) -> Peaks:
    """The peaks of a step, extrapolated over the number of layers."""
    kwargs = step.stage.trainer.get("activation_checkpointing_kwargs") or {}
    every = kwargs.get("every_n_layers", 1)  # memory grows by so many layers at a time
    few, more = (every * layers for layers in DEPTHS)
    if step.layers <= more:
        return _peaks_of_rows(step, step.layers)
    low, high = (_peaks_of_rows(step, layers) for layers in (few, more))
    return _line(low, high, (step.layers - few) / (more - few))


def _peaks_of_rows(step: TracedStep, layers: int) -> Peaks:
    """The peaks with `layers` layers, extrapolated over the number of rows."""
    chunk = max(1, CHUNK_BYTES // (4 * step.config.get_text_config().vocab_size))  # tokens
    most = max(2, TRACED_CHUNKS * chunk // step.length)
    if step.rows <= most:
        return _trace(step, layers)
    low, high = (_trace(replace(step, rows=rows), layers) for rows in (most // 2, most))
    return _line(low, high, (step.rows - most // 2) / (most - most // 2))


def uses_checkpointing(stage: Stage) -> bool:
    """Whether activations are recomputed in the backward pass."""
    return bool(stage.trainer.get("activation_checkpointing", stage.name == "sft"))  # trl's default


@cache
def count_parameters(step: TracedStep) -> tuple[int, int]:
    """The number of parameters of the model, and of those that are trained."""
    with isolated():
        model, _, _ = empty_model(step, step.layers)
    counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, _ in counts), sum(n for n, is_trained in counts if is_trained)

"""What a stage will need: memory, disk and steps, before it runs and without its weights.

The step is the real model's, on fake tensors: every allocation happens, none takes memory. Two
depths are traced and the rest is a straight line, so that a plan takes seconds.
"""

import contextlib
import copy
import inspect
import json
import os
import time
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

from hfsft.attention import DOCUMENTS, document_attention, packed_attention, varlen_attention
from hfsft.errors import MemoryShortage, ModelError, first_line
from hfsft.head import CHUNK_BYTES, fuse_head
from hfsft.hub import require_model
from hfsft.keys import AUTO, RENAMED
from hfsft.model import bf16_is_native, fresh_config, with_lora
from hfsft.recipe import STAGE_FIELDS, Recipe, Stage, check_tokens_per_step

KINDS = ("weights", "gradients", "optimizer", "activations", "attention", "head")
# assumed, not measured: the context, kernels, cuBLAS workspaces and fragmentation of a CUDA card
CUDA_OVERHEAD = 600 * 2**20
# measured here: what a process holds after importing torch, transformers, trl, peft, bitsandbytes
CPU_OVERHEAD = 480 * 2**20
DEPTHS = (2, 3)  # layers that are traced; more are a straight line from there
TRACED_CHUNKS = 8  # of the head; more rows are a straight line as well
PLANNED = "hfsft_planned"  # the attention of a traced step
RTX_4060 = 30e12  # its dense bf16 operations a second (DESIGN.md)
UTILISATION = 0.35  # assumed: the part of that rate which a training step reaches
BUSY_TOKENS = 4096  # assumed: below so many a micro-batch leaves a GPU waiting for its launches
MARGIN = 0.95  # of the limit is what `auto` may plan to take: the plan is good to some percent
OPTIMIZERS = ("adamw_torch_fused", "adamw_bnb_8bit", "paged_adamw_8bit")  # by bytes a parameter
LORA = {"r": 16}  # what is proposed


# --- a traced step ---


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of every storage that lives, by what it is for.

    torch's own `MemTracker` knows no phases, and hooks every module. A storage belongs to the kind
    that was current when it was made.
    """

    def __init__(self, unit: int):
        """Begin with nothing.

        Args:
            unit: bytes to which the allocator rounds up.
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
                self._note(tensor.untyped_storage())
        if func is torch.ops.aten.logsumexp.default:  # it makes exp(logits - max) within itself
            self._look(args[0].nbytes)
        return made

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.owners:
            return
        size = -(-storage.nbytes() // self.unit) * self.unit
        self.owners[key] = self.kind, size
        self.live[self.kind] += size
        weakref.finalize(storage, self._forget, key)
        self._look()

    def _forget(self, key: int) -> None:
        kind, size = self.owners.pop(key)
        self.live[kind] -= size

    def _look(self, unseen: int = 0) -> None:
        highest = self.peaks.get(self.phase)
        if highest is None or sum(self.live.values()) + unseen > sum(highest.values()):
            self.peaks[self.phase] = {kind: self.live[kind] for kind in KINDS}
            self.peaks[self.phase][self.kind] += unseen

    def begin(self, phase: str, kind: str) -> None:
        """Go over to another part of the step; what is made from here on is of that kind."""
        self.phase, self.kind = phase, kind
        self._look()

    def call_it(self, tensor: torch.Tensor, kind: str) -> None:
        """Count a tensor that was made as something else."""
        key = tensor.untyped_storage()._cdata
        old, size = self.owners[key]
        self.owners[key] = kind, size
        self.live[old] -= size
        self.live[kind] += size


class _Ends(list):
    """`cu_seq_lens_q` as `document_attention` reads it; a fake tensor has no values to read."""

    def diff(self) -> "_Ends":
        return self

    def tolist(self) -> list[int]:
        return list(self)


@dataclass(frozen=True)
class _Step:
    """All that the memory of a step depends on."""

    stage: Stage = field(compare=False)
    config: Any = field(compare=False)
    rows: int
    eval_rows: int  # 0: no validation
    length: int
    cuda: bool
    half: str | None  # bfloat16 or float16: of autocast
    accumulates: bool  # gradients of an earlier micro-batch are there
    settings: str = ""  # the rest as JSON, to compare

    @property
    def layers(self) -> int:
        return self.config.get_text_config().num_hidden_layers


Peaks = dict[str, dict[str, int]]  # phase → kind → bytes


@cache
def _trace(step: _Step, layers: int) -> Peaks:
    """The peaks of one step of a model of so many layers."""
    stage = step.stage
    live = _LiveBytes(512 if step.cuda else 1)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    AttentionInterface.register(PLANNED, _attention(step, live))
    with _unnoticed():
        model, fused, saved = _empty_model(step, layers)
        with fake, live:
            _make_storages(model)
            trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = _optimizer(step, model)  # its tables are real
        with fake, live:
            live.begin("optimizer step", "gradients")
            for parameter in trained:
                parameter.grad = torch.zeros_like(parameter)
            live.kind = "optimizer"
            torch.nn.utils.clip_grad_norm_(trained, stage.trainer.get("max_grad_norm") or 1.0)
            states = _first_update(optimizer, trained)
            if not step.accumulates:
                _forget_gradients(trained)
            for parameter in trained:
                parameter.register_post_accumulate_grad_hook(
                    lambda p: live.call_it(p.grad, "gradients")
                )
            _mark_phases(model, live)
            model.train()
            live.begin("forward", "activations")
            loss = _loss(step, model, fused, step.rows)
            live.begin("head, backward", "head")
            loss.backward()
            del loss
            if step.eval_rows:
                _forget_gradients(trained)
                live.begin("validation", "activations")
                model.eval()
                with torch.no_grad():
                    _loss(step, model, fused, step.eval_rows)
    peaks = {phase: kinds for phase, kinds in live.peaks.items() if phase != "start"}
    del states
    _correct(peaks, step, optimizer, trained, saved)
    return peaks


@contextlib.contextmanager
def _unnoticed() -> Iterator[None]:
    """Leave the random state alone, and say nothing of what a CPU cannot do."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _empty_model(step: _Step, layers: int) -> tuple[Any, bool, tuple[int, int]]:
    """The model as the stage has it, without storages.

    Returns:
        The model; whether its head is fused; bytes that its 4-bit weights save, and those of the
        largest unpacked one.
    """
    config, stage = copy.deepcopy(step.config), step.stage
    text = config.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    own = _own_attention(step)
    dtype = torch.bfloat16 if stage.load_in_4bit else _dtype(step)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config,
            dtype=dtype,
            attn_implementation=own,
            trust_remote_code=stage.trust_remote_code,
        )
    fused = fuse_head(model)
    if packed_attention(model, torch.device("cpu"), True, step.length) == DOCUMENTS:
        model.set_attn_implementation(PLANNED)
    if _checkpointing(stage):
        model.activation_checkpointing_enable(
            stage.trainer.get("activation_checkpointing_kwargs") or None
        )
    saved = _pack_in_4bit(model) if stage.load_in_4bit else (0, 0)
    if stage.lora is not None:
        with torch.device("meta"):
            model = with_lora(model, stage)
    return model, fused, saved


def _make_storages(model: Any) -> None:
    """Put tensors of the current mode in place of a model's meta tensors; tied ones stay tied."""
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


def _attention(step: _Step, live: _LiveBytes) -> Callable:
    """The attention that the device will have; one document takes what many do."""

    def attention(module: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        before, live.kind = live.kind, "attention"
        rows, _, length, _ = query.shape
        if step.cuda and step.half and not getattr(step.config, "attention_dropout", 0.0):
            ends = torch.zeros(rows + 1, dtype=torch.int32)
            kwargs |= {"cu_seq_lens_q": ends, "max_length_q": length}
            made = varlen_attention(module, query, *args, **kwargs)
        else:
            kwargs["cu_seq_lens_q"] = _Ends([rows * length])
            made = document_attention(module, query, *args, **kwargs)
        live.kind = before
        return made

    return attention


def _own_attention(step: _Step) -> str:
    """Eager attention is traced as it is; every other is linear, and so is what replaces sdpa."""
    return "eager" if step.stage.attn_implementation == "eager" else "sdpa"


def _dtype(step: _Step) -> torch.dtype:
    name = step.stage.dtype or "float32"
    return step.config.dtype or torch.float32 if name == AUTO else getattr(torch, name)


def _pack_in_4bit(model: Any) -> tuple[int, int]:
    """Bring a 16-bit model to the types of QLoRA; by formula, since 4 bits cannot be traced here.

    NormalFloat with nested constants takes 4.127 bits a weight (Dettmers et al. 2023); peft keeps
    all else in 32 bits.
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


def _optimizer(step: _Step, model: Any) -> torch.optim.Optimizer | None:
    """The stage's optimizer, or None for one that cannot be made from settings alone."""
    from transformers import Trainer, TrainingArguments

    keys = ("optim", "optim_args", "optim_target_modules")
    settings = {key: step.stage.trainer[key] for key in keys if key in step.stage.trainer}
    args = TrainingArguments(output_dir="", use_cpu=True, **settings)
    parameters = [p for p in model.parameters() if p.requires_grad]
    try:
        kind, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)
        if step.cuda and "fused" not in kwargs and "foreach" in inspect.signature(kind).parameters:
            kwargs["foreach"] = True  # torch's choice on a GPU
        optimizer = kind(parameters, **kwargs)
    except (ValueError, TypeError, ImportError, RuntimeError):
        return None
    if kwargs.get("optim_bits") == 8:
        # as Trainer.create_optimizer
        for module in model.modules():
            if isinstance(module, torch.nn.Embedding) and hasattr(optimizer, "mng"):
                optimizer.mng.register_module_override(module, "weight", {"optim_bits": 32})
    return optimizer


def _first_update(optimizer: Any, trained: list[torch.nn.Parameter]) -> list[torch.Tensor]:
    """The update that makes the optimizer's states; Adam's two where it cannot be traced."""
    try:
        optimizer.step()
    except Exception:  # any of 40 optimizers, or None, on fake tensors
        return [torch.zeros(2, *parameter.shape) for parameter in trained]
    return []


def _forget_gradients(trained: list[torch.nn.Parameter]) -> None:
    for parameter in trained:
        parameter.grad = None


def _mark_phases(model: Any, live: _LiveBytes) -> None:
    """Let the model's parts say when they begin: each grows along a line of its own.

    Where a step makes its first gradients, backward begins with most of the activations and ends
    with most of the gradients: two lines.
    """
    plain = model.get_base_model() if hasattr(model, "peft_config") else model

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


def _loss(step: _Step, model: Any, fused: bool, rows: int) -> torch.Tensor:
    """Forward of a micro-batch whose rows are full and whose every token is trained on."""
    length = step.length
    half = getattr(torch, step.half) if step.half else None
    plain = model.get_base_model() if hasattr(model, "peft_config") else model
    ids = torch.zeros(rows, length, dtype=torch.int64)
    inputs = {"input_ids": ids, "position_ids": torch.zeros_like(ids)}
    if plain.config._attn_implementation != PLANNED:  # it hides other documents with a mask
        shape = (rows, 1, length, length)
        eager = plain.config._attn_implementation == "eager"
        inputs["attention_mask"] = torch.zeros(shape, dtype=torch.float if eager else torch.bool)
    with torch.autocast("cpu", half) if half else contextlib.nullcontext():
        if not fused:
            return model(**inputs, labels=ids, use_cache=False).loss
        targets = torch.zeros(rows * (length - 1), dtype=torch.int64)
        return model(**inputs, targets=targets, target_positions=targets)[0]


def _correct(
    peaks: Peaks, step: _Step, optimizer: Any, trained: list[Any], saved: tuple[int, int]
) -> None:
    """What a trace on the CPU cannot show: 4-bit weights, paged states, buckets of DDP."""
    paged = 0
    if step.cuda and getattr(optimizer, "is_paged", False):
        paged = sum(
            value.nbytes
            for parameter, state in optimizer.state.items()
            for value in state.values()
            # bitsandbytes pages no smaller one
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape
            if parameter.numel() >= 1e5
        )
    processes = int(os.environ.get("WORLD_SIZE", 1))
    buckets = sum(p.numel() * 4 for p in trained) if processes > 1 else 0
    for phase, kinds in peaks.items():
        kinds["weights"] -= saved[0]
        kinds["optimizer"] -= paged
        kinds["gradients"] += buckets
        if phase != "optimizer step":
            kinds["activations"] += saved[1]


def _line(low: Peaks, high: Peaks, share: float) -> Peaks:
    """Go on from `low` by `share` times the way to `high`."""
    return {
        phase: {
            kind: round(low[phase][kind] + share * (high[phase][kind] - low[phase][kind]))
            for kind in KINDS
        }
        for phase in low
    }


def _peaks(step: _Step) -> Peaks:
    """The peaks of a step, those of many layers along a straight line."""
    if step.layers <= DEPTHS[1]:
        return _peaks_of_rows(step, step.layers)
    low, high = (_peaks_of_rows(step, layers) for layers in DEPTHS)
    return _line(low, high, (step.layers - DEPTHS[0]) / (DEPTHS[1] - DEPTHS[0]))


def _peaks_of_rows(step: _Step, layers: int) -> Peaks:
    """The peaks at some depth, those of many rows along a straight line."""
    chunk = max(1, CHUNK_BYTES // (4 * step.config.get_text_config().vocab_size))  # tokens
    most = max(2, TRACED_CHUNKS * chunk // step.length)
    if step.rows <= most:
        return _trace(step, layers)
    low, high = (_trace(replace(step, rows=rows), layers) for rows in (most // 2, most))
    return _line(low, high, (step.rows - most // 2) / (most - most // 2))


# --- a stage's plan ---


@dataclass(frozen=True)
class Plan:
    """What a stage needs; sizes in bytes, the six kinds at the moment of the peak."""

    stage: str
    device: str  # cuda or cpu
    precision: str  # bf16, fp16 or fp32
    rows: int  # of a micro-batch
    length: int  # tokens a row
    optim: str
    checkpointing: bool
    parameters: int
    trained_parameters: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    attention: int
    head: int
    overhead: int  # stated, not traced
    phase: str  # of the step, where its peak is
    phases: dict[str, int]  # the peak of each
    limit: int | None
    steps: int | None  # None: an epoch's, which the data decides
    tokens_per_step: int  # at most
    flops_per_step: int  # of these
    disk: int
    notes: tuple[str, ...] = ()

    @property
    def peak(self) -> int:
        """All kinds and the overhead together."""
        return sum(getattr(self, kind) for kind in KINDS) + self.overhead

    @property
    def headroom(self) -> int | None:
        """What is left below the limit; negative where it does not fit."""
        return None if self.limit is None else self.limit - self.peak

    @property
    def fits(self) -> bool:
        """Whether the peak is within the limit."""
        return self.limit is None or self.peak <= self.limit

    def as_data(self) -> dict[str, Any]:
        """The plan for a program."""
        return asdict(self) | {"peak": self.peak, "headroom": self.headroom, "fits": self.fits}


def plan_stage(
    recipe: Recipe,
    stage: Stage,
    limit_bytes: int | None = None,
    device_type: str | None = None,
) -> Plan:
    """What a stage will need.

    Args:
        recipe: whose stage.
        stage: without `auto` values; see `choose`.
        limit_bytes: of memory; None: `memory_limit`, and no more than the device has.
        device_type: cuda or cpu; None: cuda where a GPU is.

    Raises:
        RecipeError, ModelError: as the stage itself would.
    """
    device = device_type or ("cuda" if _has_gpu(stage) else "cpu")
    if limit_bytes is None:
        limit_bytes = _limit(stage, device)
    step = _step(recipe, stage, device == "cuda")
    peaks = _peaks(step)
    phase, highest = max(peaks.items(), key=lambda item: sum(item[1].values()))
    parameters, trained = _parameters(step)
    settings = stage.trainer
    return Plan(
        stage=stage.name,
        device=device,
        precision={"bfloat16": "bf16", "float16": "fp16", None: "fp32"}[step.half],
        rows=step.rows,
        length=step.length,
        optim=settings.get("optim", "adamw_torch_fused"),
        checkpointing=_checkpointing(stage),
        parameters=parameters,
        trained_parameters=trained,
        **highest,
        overhead=CUDA_OVERHEAD if step.cuda else CPU_OVERHEAD,
        phase=phase,
        phases={name: sum(kinds.values()) for name, kinds in peaks.items()},
        limit=limit_bytes,
        steps=stage.max_steps,
        tokens_per_step=_examples(recipe, stage) * step.length,
        flops_per_step=_examples(recipe, stage) * step.length * _token_flops(step),
        disk=_disk(stage, peaks["optimizer step"], parameters, trained),
        notes=tuple(_notes(step)),
    )


def _has_gpu(stage: Stage) -> bool:
    wanted = os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true"
    return torch.cuda.is_available() and not (wanted or stage.trainer.get("use_cpu"))


def _limit(stage: Stage, device: str) -> int | None:
    """`memory_limit`, or the device's memory where that is less; None for a card elsewhere."""
    own = [stage.memory_limit_bytes] if stage.memory_limit is not None else []
    if device == "cpu":
        own.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    elif torch.cuda.is_available():
        own.append(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
    return min(own, default=None)


def _step(recipe: Recipe, stage: Stage, cuda: bool) -> _Step:
    """The step that a stage makes on a device."""
    length = row_length(recipe, stage)
    rows = stage.trainer["per_device_train_batch_size"]
    processes = int(os.environ.get("WORLD_SIZE", 1))
    share = -(-_examples(recipe, stage) // processes)
    config = planned_config(recipe, stage)
    half = None
    if stage.trainer.get("fp16"):
        half = "float16"
    elif stage.trainer.get("bf16"):
        half = "bfloat16"
    elif cuda and stage.trainer.get("bf16") is None and stage.trainer.get("fp16") is None:
        here = torch.cuda.is_available()
        half = "bfloat16" if not here or bf16_is_native() else "float16"
    keys = ("optim", "optim_args", "activation_checkpointing_kwargs")
    settings = [
        config.to_json_string(),
        [stage.trainer.get(key) for key in keys],
        [stage.lora, stage.load_in_4bit, stage.dtype, stage.attn_implementation],
        [processes, _checkpointing(stage)],
    ]
    eval_rows = stage.trainer.get("per_device_eval_batch_size", 8)
    return _Step(
        stage=stage,
        config=config,
        rows=min(rows, share),
        eval_rows=eval_rows if stage.validates else 0,
        length=length,
        cuda=cuda,
        half=half,
        accumulates=share > rows,
        settings=json.dumps(settings),
    )


def _checkpointing(stage: Stage) -> bool:
    return bool(stage.trainer.get("activation_checkpointing", stage.name == "sft"))  # trl's default


def row_length(recipe: Recipe, stage: Stage) -> int:
    """Tokens of a stage's longest row."""
    return stage.max_length or recipe.model.get("max_position_embeddings") or 2048


def _examples(recipe: Recipe, stage: Stage) -> int:
    """Rows of an optimizer step on all devices; of sft, each conversation in one of its own."""
    if stage.name == "sft":
        return stage.examples_per_step
    if stage.tokens_per_step is None:
        return stage.trainer["per_device_train_batch_size"] * int(os.environ.get("WORLD_SIZE", 1))
    length = row_length(recipe, stage)
    return check_tokens_per_step(stage.name, stage.tokens_per_step, length, 1, recipe.path)


def planned_config(recipe: Recipe, stage: Stage) -> Any:
    """The configuration of the model that a stage trains, also where it is not trained yet.

    Raises:
        RecipeError: if base's model cannot be built.
        ModelError: if there is no such model.
    """
    if stage.name == "base":
        return fresh_config(recipe, _vocab_size(recipe))
    start = stage.model_name_or_path
    path = Path(start)
    if not path.is_dir() and path.parent == recipe.folder and path.name in recipe.stages:
        return planned_config(recipe, recipe.stages[path.name])
    require_model(start, stage.revision)
    try:
        return AutoConfig.from_pretrained(
            start, revision=stage.revision, trust_remote_code=stage.trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{start}: cannot be planned: {first_line(error)}") from None


def _vocab_size(recipe: Recipe) -> int:
    size = recipe.model.get("vocab_size") or recipe.tokenizer.get("vocab_size")
    if size:
        return size
    from hfsft.tokenizer import new_tokenizer

    return len(new_tokenizer(recipe, ()))


AttentionInterface.register(PLANNED, document_attention)  # for a model that only counts


@cache
def _parameters(step: _Step) -> tuple[int, int]:
    """How many the model has, and how many of them are trained."""
    with _unnoticed():
        model, _, _ = _empty_model(step, step.layers)
    counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, _ in counts), sum(n for n, is_trained in counts if is_trained)


def _token_flops(step: _Step) -> int:
    """Operations of forward and backward on one token of a full row (Kaplan et al. 2020)."""
    text = step.config.get_text_config()
    parameters, trained = _parameters(step)
    looked_up = 0 if text.tie_word_embeddings else text.vocab_size * text.hidden_size
    forward = 2 * (parameters - looked_up)
    attention = 2 * text.num_hidden_layers * text.hidden_size * step.length  # half of it is masked
    again = forward + attention if _checkpointing(step.stage) else 0
    return 2 * forward + 2 * min(trained, parameters - looked_up) + 3 * attention + again


@cache
def _rate(device: str, precision: str) -> float:
    """Operations a second of a large product: an RTX 4060's where no such device is here."""
    if device == "cuda" and not torch.cuda.is_available():
        return RTX_4060
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
    size = 4096 if device == "cuda" else 512
    matrix = torch.ones(size, size, dtype=dtype, device=device)
    matrix @ matrix  # the first one sets the library up
    count, began, seconds = 0, time.perf_counter(), 0.0
    while seconds < 0.2:
        matrix @ matrix
        if device == "cuda":
            torch.cuda.synchronize()
        count, seconds = count + 1, time.perf_counter() - began
    return count * 2 * size**3 / seconds


def _disk(stage: Stage, update: dict[str, int], parameters: int, trained: int) -> int:
    """Bytes of a stage's checkpoints, the one being written too, and of its finished model."""
    settings = stage.trainer
    kept = settings.get("save_total_limit")
    if kept is None:
        every, steps = settings.get("save_steps", 500), stage.max_steps or 0
        kept = int(steps / (every * steps if 0 < every < 1 else every)) if steps else 1
    count = 0 if settings.get("save_strategy") == "no" else kept + 1
    saved = trained if stage.lora is not None else parameters
    state = update["optimizer"]
    if str(settings.get("optim")).startswith("paged"):
        state += 2 * trained * (1 if "8bit" in settings["optim"] else 4)
    final = 4 * parameters + (4 * trained if stage.lora is not None else 0)
    return count * (4 * saved + state) + final


def _notes(step: _Step) -> Iterator[str]:
    if step.cuda:
        yield f"{_gb(CUDA_OVERHEAD)} of runtime overhead are assumed, not measured"
        if not torch.cuda.is_available():
            yield "no such card is here: seconds are an RTX 4060's at 30 TFLOP/s"
    if step.stage.load_in_4bit:
        yield "4-bit weights are by formula, not traced"
    if str(step.stage.trainer.get("optim")).startswith("paged"):
        yield "paged optimizer states are counted in main memory"


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"


# --- settings that fit ---


def with_settings(stage: Stage, **changes: Any) -> Stage:
    """A stage with other settings, by the keys of a recipe."""
    own = {key: value for key, value in changes.items() if key in STAGE_FIELDS}
    upstream = {RENAMED.get(key, key): changes[key] for key in changes.keys() - own.keys()}
    return replace(stage, trainer=stage.trainer | upstream, **own)


def nearest_settings(
    recipe: Recipe,
    stage: Stage,
    limit_bytes: int | None = None,
    device_type: str | None = None,
) -> list[tuple[dict[str, Any], Plan]]:
    """The nearest settings that fit where a stage does not.

    Args:
        recipe: as `plan_stage` takes it; and the rest.

    Returns:
        Changed settings by the recipe's keys, each with its own plan: those that suffice alone, or
        else the fewest together, or nothing.
    """

    def plan(changes: dict[str, Any]) -> Plan:
        return plan_stage(recipe, with_settings(stage, **changes), limit_bytes, device_type)

    def largest(key: str, values: list[int]) -> list[dict[str, Any]]:
        best = _largest(values, lambda value: plan({key: value}).fits)
        return [] if best is None else [{key: best}]

    now = plan({})
    halves = [now.length >> by for by in range(6, 0, -1) if now.length >> by >= 64]
    lengths = list(range(64, now.length, 64)) if stage.name == "sft" else halves
    smaller = [{"optim": optim} for optim in _smaller_optimizers(now)]
    checkpointing = [] if now.checkpointing else [{"gradient_checkpointing": True}]
    adapter = [{"lora": LORA}] if stage.name != "base" and stage.lora is None else []
    rows = list(range(1, now.rows)) if _may_cut_rows(stage) else []
    alone = [*largest("per_device_train_batch_size", rows), *checkpointing, *smaller, *adapter]
    found = [(changes, plan(changes)) for changes in [*alone, *largest("max_length", lengths)]]
    found = [(changes, its_plan) for changes, its_plan in found if its_plan.fits]
    if found:
        return found
    together: dict[str, Any] = {}
    for changes in [{"per_device_train_batch_size": 1}] * bool(rows) + alone:
        together |= changes
        if (its_plan := plan(together)).fits:
            return [(together, its_plan)]
    best = _largest(lengths, lambda length: plan(together | {"max_length": length}).fits)
    if best is None:
        return []
    together["max_length"] = best
    return [(together, plan(together))]


def _smaller_optimizers(plan: Plan) -> tuple[str, ...]:
    after = OPTIMIZERS.index(plan.optim) + 1 if plan.optim in OPTIMIZERS else 1
    return OPTIMIZERS[after:] if plan.device == "cuda" else OPTIMIZERS[after:2]


def _may_cut_rows(stage: Stage) -> bool:
    """Whether a smaller micro-batch leaves the step as it is."""
    return stage.name == "sft" or stage.tokens_per_step is not None


def _largest(values: list[int], fits: Callable[[int], bool]) -> int | None:
    """The largest of ascending values that fits, or None; larger ones need more."""
    if not values or not fits(values[0]):
        return None
    low, high = 1, len(values)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if fits(values[middle]) else (low, middle)
    return values[low - 1]


def choose(
    recipe: Recipe,
    stage: Stage,
    limit_bytes: int | None = None,
    device_type: str | None = None,
) -> tuple[Stage, str]:
    """Settle a stage's `auto` values: the largest micro-batch and the cheapest settings that fit.

    What costs no time is given up first: 32-bit optimizer states, then stored activations, and only
    then a micro-batch of `BUSY_TOKENS`. The step's examples, and so its result, stay as they are.

    Args:
        recipe: as `plan_stage` takes it; and the rest.

    Returns:
        The stage with values in their place, and one sentence of what was chosen and why; an empty
        one where nothing was `auto`.
    """
    keys = ("per_device_train_batch_size", "activation_checkpointing", "optim")
    if AUTO not in [stage.trainer.get(key) for key in keys]:
        return stage, ""
    given_rows, given_checkpointing, given_optim = (stage.trainer.get(key) for key in keys)
    device = device_type or ("cuda" if _has_gpu(stage) else "cpu")
    limit = _limit(stage, device) if limit_bytes is None else limit_bytes
    optims = OPTIMIZERS if device == "cuda" else OPTIMIZERS[:2]
    settings = [
        {"activation_checkpointing": checkpointing, "optim": optim}
        for checkpointing in ((False, True) if given_checkpointing == AUTO else (None,))
        for optim in (optims if given_optim == AUTO else (None,))
    ]
    settings = [{k: v for k, v in item.items() if v is not None} for item in settings]
    settings.sort(key=lambda item: item.get("optim") == OPTIMIZERS[2])  # it may wait for the bus
    rows = [given_rows]
    if given_rows == AUTO:
        processes = int(os.environ.get("WORLD_SIZE", 1))
        rows = list(range(1, -(-_examples(recipe, stage) // processes) + 1))

    def plan(item: dict[str, Any], count: int) -> Plan:
        changed = with_settings(stage, per_device_train_batch_size=count, **item)
        return plan_stage(recipe, changed, limit and int(limit * MARGIN), device)

    enough = min(rows[-1], -(-BUSY_TOKENS // row_length(recipe, stage)))
    enough = rows[0] if given_rows != AUTO else enough
    chosen = next((item for item in settings if plan(item, enough).fits), settings[-1])
    best = _largest(rows, lambda count: plan(chosen, count).fits) or rows[0]
    its_plan = plan(chosen, best)
    told = {"per_device_train_batch_size": best} if given_rows == AUTO else {}
    told |= chosen
    why = f"{stage.name}: auto chose {_words(told)}, planned at {_gb(its_plan.peak)}"
    if limit is not None:
        why += f" of {_gb(limit)}"
    refused = _refused(plan, settings, chosen, best, rows, enough)
    return with_settings(stage, per_device_train_batch_size=best, **chosen), why + refused


def _refused(
    plan: Callable[[dict[str, Any], int], Plan],
    settings: list[dict[str, Any]],
    chosen: dict[str, Any],
    best: int,
    rows: list[int],
    enough: int,
) -> str:
    """The end of a sentence: the cheaper or larger choice that would not fit."""
    before = settings.index(chosen) - 1
    if before >= 0:
        return f"; {_words(settings[before])} would take {_gb(plan(settings[before], enough).peak)}"
    if best < rows[-1]:
        return f"; {best + 1} rows would take {_gb(plan(chosen, best + 1).peak)}"
    return "; it is the whole step at once" if len(rows) > 1 else ""


def _words(changes: dict[str, Any]) -> str:
    """Settings as the command line takes them."""
    words = []
    for key, value in changes.items():
        key = {new: old for old, new in RENAMED.items()}.get(key, key)
        if isinstance(value, dict):
            words += [f"--{key}.{name} {item}" for name, item in value.items()]
        else:
            words.append(f"--{key} {json.dumps(value) if isinstance(value, bool) else value}")
    return " ".join(words)


def require_fit(
    recipe: Recipe,
    stage: Stage,
    limit_bytes: int | None = None,
    device_type: str | None = None,
) -> Plan:
    """Plan a stage, and refuse one that does not fit.

    Args:
        recipe: as `plan_stage` takes it; with `ignore_plan`, nothing is refused.

    Raises:
        MemoryShortage: with the sizes, and the nearest settings that fit.
    """
    plan = plan_stage(recipe, stage, limit_bytes, device_type)
    if plan.fits or recipe.ignore_plan:
        return plan
    sizes = ", ".join(f"{kind} {getattr(plan, kind) / 1e9:.2f}" for kind in (*KINDS, "overhead"))
    nearest = nearest_settings(recipe, stage, limit_bytes, device_type)
    fitting = [f"{_words(changes)} ({_gb(its_plan.peak)})" for changes, its_plan in nearest]
    raise MemoryShortage(
        f"{stage.name}: needs {_gb(plan.peak)} at its peak ({plan.phase}), "
        f"{_gb(-plan.headroom)} more than there is\n"
        f"  GB: {sizes}\n"
        f"  What fits: {'; '.join(fitting) or 'nothing near; take a smaller model'}\n"
        "  --ignore_plan starts it all the same"
    )


# --- a run's plan ---


def plan_run(recipe: Recipe, memory: int | None = None) -> dict[str, Any]:
    """Plan every stage of a run, one after the other.

    Args:
        recipe: whose stages, `auto` values included.
        memory: bytes of a CUDA card to plan for; None: this machine's device.

    Returns:
        `stages`: name → `Plan.as_data`, `auto` (what was chosen) and `nearest` (where it does not
        fit), `seconds_per_step`, at most; `disk`: bytes of all.

    Raises:
        RecipeError, ModelError: as the stages themselves would.
    """
    stages = {}
    for name, stage in recipe.stages.items():
        device, limit = None if memory is None else "cuda", memory
        if memory is not None and stage.memory_limit is not None:
            limit = min(memory, stage.memory_limit_bytes)
        stage, why = choose(recipe, stage, limit, device)
        plan = plan_stage(recipe, stage, limit, device)
        nearest = [] if plan.fits else nearest_settings(recipe, stage, limit, device)
        other = with_settings(stage, gradient_checkpointing=not plan.checkpointing)
        stages[name] = plan.as_data() | {
            "peak_with_checkpointing_changed": plan_stage(recipe, other, limit, device).peak,
            "seconds_per_step": plan.flops_per_step
            / (UTILISATION * _rate(plan.device, plan.precision)),
            "auto": why,
            "nearest": [
                {"settings": _words(changes), "peak": its_plan.peak}
                for changes, its_plan in nearest
            ],
        }
    return {"stages": stages, "disk": sum(data["disk"] for data in stages.values())}


def print_plan(planned: dict[str, Any]) -> None:
    """Print what `plan_run` returns: a table with a column for each stage, and what fits."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    stages = planned["stages"]
    table = Table(box=box.SIMPLE_HEAD, header_style="bold")
    table.add_column("GB")
    for name in stages:
        table.add_column(name, justify="right")

    def row(label: str, shown: Callable[[dict[str, Any]], str], **style: Any) -> None:
        table.add_row(label, *(shown(data) for data in stages.values()), **style)

    row("device", lambda data: f"{data['device']}, {data['precision']}")
    row("micro-batch", lambda data: f"{data['rows']} x {data['length']:,}")
    row("optimizer", lambda data: data["optim"])
    row("checkpointing", lambda data: "yes" if data["checkpointing"] else "no", end_section=True)
    row("parameters, M", lambda data: f"{data['parameters'] / 1e6:.1f}")
    for kind in (*KINDS, "overhead"):
        label = "optimizer states" if kind == "optimizer" else kind
        row(label, lambda data, kind=kind: f"{data[kind] / 1e9:.2f}")
    row("peak", lambda data: f"{data['peak'] / 1e9:.2f}", style="bold")
    row("peak is in", lambda data: data["phase"])
    other = "peak_with_checkpointing_changed"
    row("peak, checkpointing changed", lambda data: f"{data[other] / 1e9:.2f}")
    row("limit", lambda data: "none" if data["limit"] is None else f"{data['limit'] / 1e9:.2f}")
    row("fits", lambda data: "yes" if data["fits"] else "no", style="bold", end_section=True)
    row("steps", lambda data: f"{data['steps']:,}" if data["steps"] else "by epoch")
    row("tokens a step, at most", lambda data: f"{data['tokens_per_step']:,}")
    row("seconds a step, at most", lambda data: f"{data['seconds_per_step']:.3g}")
    row("disk", lambda data: f"{data['disk'] / 1e9:.2f}")
    console.print(table)
    for name, data in stages.items():
        if data["auto"]:
            console.print(data["auto"])
        if not data["fits"]:
            console.print(
                f"{name} does not fit; what does:"
                if data["nearest"]
                else f"{name} does not fit, and nothing near it does"
            )
        for item in data["nearest"]:
            console.print(f"  {_gb(item['peak'])}  {item['settings']}")
    console.print(
        f"Seconds are from operations, at {UTILISATION:.0%} of the device's rate in large products."
    )
    console.print(f"The run takes up to {_gb(planned['disk'])} on disk.")
    for note in dict.fromkeys(note for data in stages.values() for note in data["notes"]):
        console.print(f"Note: {note}.", style="dim")

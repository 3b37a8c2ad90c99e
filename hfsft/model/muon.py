"""Muon for the matrices of the blocks and AdamW for the rest, as one optimizer behind `Trainer`.

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) orthogonalises the momentum of a matrix
before it is added. The split of the parameters, the momentum's warm-up and the scaling of AdamW's
learning rates are those of karpathy/nanochat, October 2025 (`setup_optimizers`,
`get_muon_momentum`).
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from hfsft.model.loading import plain_model
from hfsft.recipe.schema import Stage
from hfsft.recipe.sections import MUON_SETTINGS

TUNED_WIDTH = 768  # the hidden size at which nanochat's learning rates of AdamW were tuned


class MuonAdamW(torch.optim.Optimizer):
    """torch's AdamW and Muon behind one set of groups and one state.

    Both work on this optimizer's own groups and state, so that saving, loading and the schedule
    are those of any `torch.optim.Optimizer`.
    """

    def __init__(
        self,
        adamw: list[dict[str, Any]],
        muon: dict[str, Any],
        momentum_start: float,
        momentum_warmup_steps: int,
    ):
        """Set both up.

        Args:
            adamw: AdamW's groups.
            muon: Muon's group; its `momentum` is reached after the warm-up.
            momentum_start: the momentum of the first step.
            momentum_warmup_steps: updates over which the momentum rises linearly.
        """
        self.adamw = torch.optim.AdamW(adamw, fused=True)
        self.muon = torch.optim.Muon([muon])
        self.momentum = momentum_start, muon["momentum"], momentum_warmup_steps
        for group in self.muon.param_groups:
            group["updates"] = 0  # in the group, so that a checkpoint holds it
        super().__init__([*self.adamw.param_groups, *self.muon.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; Muon's momentum warms up with its updates."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # `load_state_dict` replaces groups and state by new objects
        self.adamw.state = self.muon.state = self.state
        self.muon.param_groups = [group for group in self.param_groups if "updates" in group]
        self.adamw.param_groups = [group for group in self.param_groups if "updates" not in group]
        start, end, steps = self.momentum
        for group in self.muon.param_groups:
            share = min(group["updates"] / steps, 1.0) if steps else 1.0
            group["momentum"] = (1 - share) * start + share * end
            group["updates"] += any(p.grad is not None for p in group["params"])
        self.adamw.step()
        on_cpu = all(p.device.type == "cpu" for p in self.muon.param_groups[0]["params"])
        with _Float32Products() if on_cpu else nullcontext():
            self.muon.step()
        return loss


class _Float32Products(TorchFunctionMode):
    """Muon's products in float32, where torch's Muon casts them to bfloat16.

    On a CPU without bfloat16 arithmetic those took 70 times as long: 3.4 s a step of the demo.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.bfloat16:
            return args[0].clone()
        return func(*args, **(kwargs or {}))


def muon_adamw(model: Any, stage: Stage, args: Any) -> MuonAdamW:
    """The optimizer of a stage with `optim: muon`.

    Args:
        model: whose parameters that require gradients are trained.
        stage: its `muon` settings.
        args: `TrainingArguments`: AdamW's learning rate, betas, epsilon and weight decay.
    """
    settings = {name: one.default for name, one in MUON_SETTINGS.items()} | (stage.muon or {})
    matrices, embedding, others = split_parameters(plain_model(model))
    scale = 1.0
    if settings["scale_by_width"]:
        width = model.config.get_text_config().hidden_size
        scale = (width / TUNED_WIDTH) ** -0.5
    rate = scale * args.learning_rate
    embedding_rate = scale * (settings["embedding_learning_rate"] or args.learning_rate)
    shared = {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    groups = [
        {"params": [p for p in others if p.ndim > 1], "lr": rate},
        {"params": [p for p in others if p.ndim <= 1], "lr": rate},  # biases and norms
        {"params": embedding, "lr": embedding_rate},
    ]
    adamw = [
        {"weight_decay": 0.0 if index == 1 else args.weight_decay, **shared, **group}
        for index, group in enumerate(groups)
        if group["params"]
    ]
    decay = settings["weight_decay"]
    muon = {
        "params": matrices,
        "lr": settings["learning_rate"],
        "weight_decay": args.weight_decay if decay is None else decay,
        "momentum": settings["momentum"],
        "adjust_lr_fn": settings["adjust_lr_fn"],
    }
    return MuonAdamW(adamw, muon, settings["momentum_start"], settings["momentum_warmup_steps"])


def split_parameters(
    model: Any,
) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
    """The trained parameters: the blocks' matrices; an untied token embedding; all others.

    A tied embedding is the head as well, and counts among the others.
    """
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    looked_up = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    unembedding = None if head is None else head.weight
    parts: tuple[list[nn.Parameter], ...] = ([], [], [])
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        is_head = parameter is unembedding
        if parameter is embedding and not is_head:
            parts[1].append(parameter)
        elif parameter.ndim == 2 and not is_head and id(parameter) not in looked_up:
            parts[0].append(parameter)
        else:
            parts[2].append(parameter)
    return parts

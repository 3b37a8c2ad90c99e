"""The trainers: transformers' and trl's, with our step, checkpoints and validation before them."""

from typing import Any

import torch
from transformers import Trainer
from trl import SFTTrainer

from hfsft.train.step import DealtSampler
from hfsft.train.validating import ValidatingStep

# what hfsft uses or overrides of its libraries that is not public API, and what for; a test fails,
# by name, where a release removes or renames one
PRIVATE_API = {
    "transformers.Trainer": {
        "_train_batch_size": "set to a whole step's examples, so that the data loader yields steps",
        "_get_train_sampler": "one seeded order over the whole run, epochs included",
        "_get_num_items_in_batch": "trained tokens of a step, before it is cut into micro-batches",
        "_get_grad_norm": "the clipped norm, which no callback is given",
        "_tr_loss": "the loss summed for the next log line, kept in a checkpoint",
        "_globalstep_last_logged": "the step of the last log line, kept in a checkpoint",
        "_save_checkpoint": "written to a partial folder, hashed into a manifest, then renamed",
        "_save_optimizer_and_scheduler": "part of our checkpoint, as Trainer writes it",
        "_save_scaler": "part of our checkpoint, as Trainer writes it",
        "_save_rng_state": "part of our checkpoint, as Trainer writes it",
        "_load_rng_state": "a stream skips no data, and Trainer restores them only where it skips",
        "_evaluate": "a checkpoint that is due is saved before a validation, which may fail",
    },
    "trl.SFTTrainer": {"aux_loss_enabled": "a model with router losses keeps trl's own loss"},
    "accelerate.state.GradientState": {
        "_set_sync_gradients": "micro-batches before the last one do not reduce gradients",
    },
    "transformers.PreTrainedConfig": {
        "_attn_implementation": "the attention a model came with, to return to it",
    },
    "transformers.modeling_utils": {
        "save_on_cpu": "counted as main memory in a plan, with `offload: true`",
    },
    "accelerate.PartialState": {"_cpu": "whether the layout is one of CPUs"},
    "torch.distributed.distributed_c10d": {
        "_get_default_store": "the launcher's store, through which ranks watch each other",
    },
    "datasets.Dataset": {
        "_fingerprint": "names what cached rows were made from",
        "_indices": "a run's order is a view of the conversations, not a copy",
    },
    "torch._dynamo.exc": {"TorchDynamoException": "a failure of the compiler, not of the step"},
    "torch._subclasses.fake_tensor": {"FakeTensorMode": "a step is traced without memory"},
    "torch.utils._python_dispatch": {"TorchDispatchMode": "sees every tensor of a traced step"},
    "torch.utils._pytree": {"tree_leaves": "the tensors among an operation's results"},
    "torch.UntypedStorage": {"_cdata": "tells the storages of a traced step apart"},
    "torch.nn.Module": {
        "_parameters": "each is replaced by one without memory",
        "_buffers": "each is replaced by one without memory",
    },
    "httpx2.Client": {
        "_transport": "the way to a client's sockets, whose answers are bounded",
        "_mounts": "the same, to those of proxies",
    },
    "httpx2.HTTPTransport": {"_pool": "the same"},
    "httpcore2.ConnectionPool": {"_network_backend": "the same"},
    "rich.console.Console": {"_render_buffer": "where control characters are taken out"},
}


class StageTrainer(ValidatingStep, Trainer):
    """The trainer of base and mid."""


class SFTStageTrainer(ValidatingStep, SFTTrainer):
    """The trainer of sft, whose training set lists the examples of the run in their order."""

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler:
        examples, ranks = self.get_total_train_batch_size(self.args), self.args.world_size
        if ranks == 1:
            return torch.utils.data.SequentialSampler(self.train_dataset)
        return DealtSampler(self.train_dataset.lengths, examples, ranks)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write no card beside a checkpoint: the finished stage gets its own."""

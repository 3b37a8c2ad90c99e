"""FSDP2 on the CPU with gloo, which Accelerate excludes: run a stage with that one branch forced.

accelerate launch --config_file fsdp2.yaml tests/train/fsdp_on_gloo.py sft RECIPE --key value
"""

import importlib
import sys
from typing import Any

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from hfsft.process import run_main

upstream_init = AcceleratorState.__init__


def init_with_fsdp(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
    """What Accelerate does on a GPU where FSDP is configured."""
    fresh = AcceleratorState._shared_state == {}
    upstream_init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fresh and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
        PartialState._shared_state["distributed_type"] = self.distributed_type


if __name__ == "__main__":
    AcceleratorState.__init__ = init_with_fsdp
    stage, *argv = sys.argv[1:]
    run_main(importlib.import_module(f"hfsft.{stage}").main, *argv)

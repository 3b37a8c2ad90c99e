"""The head's loss computed in four ways on the same hidden states: time and peak memory.

    python benchmarks/head.py [--vocabulary 65536] [--width 512] [--tokens 2048] [--trained 0.4]

"logits" is what transformers does in a training step; "trl" is trl's fused head, "trl, trained" the
same on trained positions only; "hfsft" is `linear_cross_entropy`. Measured are a forward and a
backward pass, each variant in a process of its own; the peak is the process's increase (ru_maxrss),
on CUDA the allocator's.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

VARIANTS = ("logits", "trl", "trl, trained", "hfsft")


def measure(variant: str, given: argparse.Namespace) -> dict[str, float]:
    """Median seconds of a forward and backward pass, and peak memory beyond the inputs."""
    import torch
    from torch.nn.functional import linear
    from transformers.loss.loss_utils import ForCausalLMLoss
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE, _ChunkedLogProbFunction

    from hfsft.model.head import linear_cross_entropy

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    hidden = torch.randn(1, given.tokens, given.width, device=device, requires_grad=True)
    weight = torch.randn(given.vocabulary, given.width, device=device) / given.width**0.5
    weight.requires_grad_()
    weight.grad = torch.zeros_like(weight)  # as after the first micro-batch
    targets = torch.randint(0, given.vocabulary, (given.tokens,), device=device)
    trained = torch.rand(given.tokens, device=device) < given.trained
    positions, count = trained.nonzero().flatten(), int(trained.sum())

    def trl(states: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        return _ChunkedLogProbFunction.apply(
            states,
            weight,
            None,
            wanted,
            1.0,
            _CHUNKED_LOGPROB_CHUNK_SIZE,
            None,
            1.0,
            ("log_probs",),
        )[0]

    def loss() -> torch.Tensor:
        flat = hidden[0]
        if variant == "logits":
            labels = targets.where(trained, -100)[None]
            logits = linear(hidden, weight)
            return ForCausalLMLoss(logits, None, given.vocabulary, shift_labels=labels)
        if variant == "trl":  # without Triton every position is scored
            return -(trl(flat, targets) * trained).sum() / count
        if variant == "trl, trained":
            return -trl(flat[positions], targets[positions]).sum() / count
        return linear_cross_entropy(flat[positions], weight, None, targets[positions])[0] / count

    seconds = []
    idle = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        idle = torch.cuda.memory_allocated()
    for _ in range(given.repeats + 1):
        began = time.perf_counter()
        value = loss()
        value.backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    return {
        "seconds": statistics.median(seconds[1:]),
        "peak": (peak - idle) / 2**20,
        "loss": value.item(),
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--vocabulary", type=int, default=65536)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--trained", type=float, default=0.4, help="share of trained tokens")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(measure(given.child, given)))
        return
    found = {}
    for variant in VARIANTS:
        done = subprocess.run(
            [sys.executable, *sys.argv, "--child", variant], capture_output=True, text=True
        )
        if done.returncode:
            sys.exit(done.stderr)
        found[variant] = json.loads(done.stdout.splitlines()[-1])
    print(
        f"{given.tokens} tokens, {given.trained:.0%} trained, vocabulary {given.vocabulary:,}, "
        f"width {given.width}"
    )
    print(f"{'':14}{'seconds':>9}{'MiB':>8}{'time':>7}{'memory':>8}{'loss':>10}")
    base = found["logits"]
    for variant, of in found.items():
        print(
            f"{variant:14}{of['seconds']:9.2f}{of['peak']:8,.0f}"
            f"{of['seconds'] / base['seconds']:7.2f}{of['peak'] / base['peak']:8.2f}"
            f"{of['loss']:10.5f}"
        )


if __name__ == "__main__":
    main()

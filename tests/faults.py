"""Kill a stage at random moments, give the same command until it is done, compare the bits.

    python tests/faults.py FOLDER [--rounds 50] [--configs sft,lora] [--seed 0] [--signal KILL]

Every round is a run of its own: it is killed up to three times, and must end with the weights, the
optimizer's states and the log of one that was left alone. Prints a line a configuration.

The `layouts` draw the number of processes anew for each attempt, and whether `hfsft` launches them.
Killed are all of them, one rank, or the launcher alone. Such a round must end within rounding of
one process: weights by 5e-6 of their norm, logged losses by 1e-6.

Processes are forked from this one, which has imported all they need. Ranks find each other
without torchrun, which `test_ranks.py` is for, unless they are launched; `run` is the command
`hfsft run` with all its processes.
"""

import argparse
import atexit
import contextlib
import hashlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
import yaml
from hub_server import HubServer
from safetensors.torch import load_file

from hfsft import base, mid, sft
from hfsft.data.tasks import facts
from hfsft.process import run_main
from hfsft.run.manifest import PARTIAL

STEPS = 6
# of a log line, what no two runs share
CLOCKED = {"seconds", "eval_seconds", "sample_seconds", "memory_bytes"}
MODEL = {
    "model_type": "nanochat",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 400,
    "max_position_embeddings": 64,
    "attention_dropout": 0.1,
}
EVERY_STEP = {"logging_steps": 2, "save_steps": 1, "eval_steps": 3, "max_steps": STEPS}
RECIPE = {
    "name": "start",
    "sample_prompts": [],
    "model": MODEL,
    "tokenizer": {"train": True},
    "base": {
        "data": [{"path": "facts", "rows": 200}],
        "held_out": 10,
        "max_length": 64,
        "per_device_train_batch_size": 2,
        "tokens_per_step": 256,
        **EVERY_STEP,
    },
    "mid": {
        "data": [{"path": "small_talk", "rows": 60}],
        "held_out": 6,
        "max_length": 64,
        "per_device_train_batch_size": 2,
        "tokens_per_step": 256,
        **EVERY_STEP,
    },
    "sft": {
        "data": [{"path": "simple_spelling", "rows": 60}],
        "held_out": 6,
        "examples_per_step": 8,
        "max_length": 64,
        "learning_rate": 1e-3,
        **EVERY_STEP,
    },
}
STREAM = ("--data", "[{path: me/text, streaming: true}]", "--held_out", "20")


@dataclass(frozen=True)
class Config:
    """What is run: a stage, or all of them."""

    stage: object  # its module; None: `hfsft run`
    extra: tuple[str, ...] = ()  # of its command line
    ranks: int = 1
    draws: bool = False  # another one of `SPREADS` for each attempt


# processes, and whether `hfsft` launches them
SPREADS = ((1, False), (2, False), (4, False), (2, True))
LORA = ("--lora.r", "4", "--lora.lora_dropout", "0.1")
LONGER = ("--max_steps", "24", "--save_steps", "2", "--optim", "adamw_torch_fused")
WEIGHTS, LOSSES = 5e-6, 1e-6  # the most that rounding may change: relative, absolute
MINUTE = 60  # seconds in which every process has ended after one of them was killed

CONFIGS = {
    "base": Config(base),
    "mid": Config(mid, ("--dataloader_num_workers", "1")),
    "sft": Config(sft),
    "lora": Config(sft, LORA),
    "workers": Config(sft, ("--dataloader_num_workers", "2", "--optim", "adamw_torch")),
    "stream": Config(base, STREAM),
    "ranks": Config(sft, ranks=2),
    "mid-ranks": Config(mid, ranks=2),
    "run": Config(None),
    "layouts-base": Config(base, LONGER, draws=True),
    "layouts-mid": Config(mid, LONGER, draws=True),
    "layouts": Config(sft, LONGER, draws=True),
    "layouts-lora": Config(sft, (*LONGER, *LORA), draws=True),
}


class Run:
    """A command's processes."""

    def __init__(
        self, config: Config, recipe: Path, name: str, ranks: int = 1, launched: bool = False
    ):
        argv = [str(recipe), "--name", name, "--quiet", *config.extra]
        self.group, self.ranks = None, []
        if config.stage not in (None, base):
            start = recipe.parent / "runs" / "start" / ("base" if config.stage is mid else "mid")
            argv += ["--model_name_or_path", str(start)]
        if config.stage is None or launched:
            what = "run" if config.stage is None else config.stage.__name__.split(".")[1]
            argv += ["--num_processes", str(ranks)] if launched else []
            command = [sys.executable, "-m", "hfsft", what, *argv]
            env = {**os.environ, "ACCELERATE_USE_CPU": "true"}
            self.group = subprocess.Popen(command, start_new_session=True, env=env)
            self.processes = [self.group.pid]
            return
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.processes = [_fork(config, argv, rank, ranks, str(port)) for rank in range(ranks)]

    def send(self, number: int, rng: random.Random, alone: bool = False) -> None:
        """Kill every process, or signal one: a launcher, a rank, or both ranks one by one.

        `alone` kills the launcher or a rank in two of three cases.
        """
        told = self.processes
        if self.group is not None and number == signal.SIGKILL:
            found = psutil.Process(self.group.pid)
            self.ranks = found.children(recursive=True)
            one = rng.choice([found, *self.ranks])
            with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
                if alone and rng.random() < 2 / 3:
                    one.kill()
                else:
                    os.killpg(self.group.pid, number)
                    for rank in self.ranks:  # in sessions of their own
                        rank.kill()
            return
        part = 2 / 3 if alone else 0.5
        if (alone or number != signal.SIGKILL) and len(told) > 1 and rng.random() < part:
            told = [rng.choice(told)]
        for index, process in enumerate(told):
            if index and number != signal.SIGKILL:
                time.sleep(rng.uniform(0.0, 0.6))
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)

    def end(self) -> int:
        """Wait for it; the first exit status that is not 0, below 0 after a signal."""
        if self.group is not None:
            status = self.group.wait()
            left = psutil.wait_procs(self.ranks, timeout=MINUTE)[1]
            for rank in left:
                rank.kill()
            assert left == [], f"{left} outlived their launcher by {MINUTE} s"
            return status
        first, left = 0, list(self.processes)
        while left:
            child, status = os.waitpid(-1, 0)
            left.remove(child)
            first = first or os.waitstatus_to_exitcode(status)
            if first:  # as torchrun does
                for other in left:
                    os.kill(other, signal.SIGTERM)
        return first


def _fork(config: Config, argv: list[str], rank: int, ranks: int, port: str) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        if ranks > 1:
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks}
            os.environ.update({key: str(value) for key, value in place.items()})
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            os.environ |= {"LOCAL_WORLD_SIZE": str(ranks), "ACCELERATE_USE_CPU": "true"}
        torch.set_num_threads(1)
        run_main(config.stage.main, *argv)
        status = 0
    except SystemExit as end:
        status = end.code
    finally:
        atexit._run_exitfuncs()  # a fork that returned would run its parent's code instead
        sys.stderr.flush()
        os._exit(status)


def bits(folder: Path, steps: int = STEPS) -> dict[str, str]:
    """Digests of what a run leaves: weights, optimizer states, and the log without its seconds."""
    found = {}
    for name in ("model.safetensors", f"checkpoints/checkpoint-{steps}/optimizer.pt"):
        found[name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = [timeless(line) for line in lines]
    found["metrics.jsonl"] = json.dumps(sorted(kept, key=lambda line: (line["step"], sorted(line))))
    return found


def timeless(line: dict) -> dict:
    """A log line without what no two runs share."""
    kept = {key: line[key] for key in line.keys() - CLOCKED}
    if "advice" in kept:  # its sentence names minutes
        kept["advice"] = {key: line["advice"][key] for key in line["advice"].keys() - {"says"}}
    return kept


def losses(folder: Path) -> dict[tuple[int, str], float]:
    """The losses that a stage logged, by step and name."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    wanted = ("loss", "eval_loss")
    return {(line["step"], key): line[key] for line in lines for key in wanted if key in line}


def difference(one: Path, other: Path) -> float:
    """The largest relative L2 difference of a weight tensor between two models' folders."""
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert ours.keys() == theirs.keys()
    return max(
        float(torch.linalg.norm(ours[name].double() - theirs[name].double()))
        / max(float(torch.linalg.norm(ours[name].double())), 1e-30)
        for name in ours
    )


def differences(config: Config, whole: Path, found: Path) -> list[str]:
    """What a run ended with that is not as in the one that was left alone: bits, or rounding."""
    stages = ("base", "mid", "sft")
    if config.stage is not None:
        stages = (config.stage.__name__.split(".")[1],)
    problems = []
    for stage in stages:
        one, other = whole / stage, found / stage
        if config.draws:
            weights, expected, logged = difference(one, other), losses(one), losses(other)
            if weights > WEIGHTS:
                problems.append(f"{stage}: a weight differs by {weights:.1e}")
            if expected.keys() != logged.keys():
                problems.append(f"{stage}: logged {sorted(expected)}\n  {sorted(logged)}")
            elif (most := max(abs(logged[key] - expected[key]) for key in logged)) > LOSSES:
                problems.append(f"{stage}: a logged loss differs by {most:.1e}")
            continue
        expected, left = bits(one), bits(other)
        for what in expected:
            if left[what] != expected[what]:
                problems.append(f"{stage}/{what}\n  {expected[what]}\n  {left[what]}")
    return problems


def rounds(name: str, recipe: Path, count: int, number: int, rng: random.Random) -> dict[str, int]:
    """Break a configuration so many times; what happened."""
    config, home = CONFIGS[name], recipe.parent / "runs"
    spreads = SPREADS if config.draws else ((config.ranks, False),)
    seen = {"rounds": count, "kills": 0, "during a save": 0, "other statuses": 0, "mismatches": 0}

    def compare(run_name: str) -> None:
        problems = differences(config, home / f"{name}-whole", home / run_name)
        seen["mismatches"] += bool(problems)
        for problem in problems:
            print(f"{run_name}: {problem}", flush=True)

    lasted = {}
    for spread in spreads:
        began, run_name = time.monotonic(), f"{name}-whole"
        if lasted:
            run_name += f"-{spread[0]}{'-launched' * spread[1]}"
        assert Run(config, recipe, run_name, *spread).end() == 0
        lasted[spread] = time.monotonic() - began
        compare(run_name)
    for index in range(count):
        run_name = f"{name}-{index}"
        for _ in range(rng.randint(1, 3)):
            spread = rng.choice(spreads)
            run = Run(config, recipe, run_name, *spread)
            time.sleep(rng.uniform(0.05, 1.0) * lasted[spread])
            run.send(number, rng, config.draws)
            if (status := run.end()) == 0:
                break
            seen["kills"] += 1
            seen["during a save"] += any((home / run_name).glob(f"*/checkpoints/{PARTIAL}"))
            # of two ranks the one killed last may first say that the other is dead
            if status not in (-number, 128 + number, *((2,) if spread[0] > 1 else ())):
                print(f"{run_name}: exit status {status}", flush=True)
                seen["other statuses"] += 1
        seen["other statuses"] += Run(config, recipe, run_name, *rng.choice(spreads)).end() != 0
        compare(run_name)
    return seen


def prepare(folder: Path, dropout: float, stage: object) -> Path:
    """Write the recipe and train what a stage starts from, if that is not done; its path."""
    folder.mkdir(exist_ok=True)
    recipe = folder / "faults.yaml"
    model = MODEL | {"attention_dropout": dropout}
    text = yaml.safe_dump(RECIPE | {"model": model, "output_dir": str(folder / "runs")})
    recipe.write_text(text)
    for earlier in (base, mid) if stage not in (None, base) else ():
        if not (folder / "runs" / "start" / earlier.__name__.split(".")[1]).exists():
            assert Run(Config(earlier), recipe, "start").end() == 0
    return recipe


def main() -> None:
    """Break every configuration; exit 1 if one ended otherwise than a run left alone."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--configs", default=",".join(CONFIGS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--signal", default="KILL", choices=("KILL", "TERM", "INT", "HUP"))
    given = parser.parse_args()
    number = signal.Signals[f"SIG{given.signal}"]
    for taken in (signal.SIGINT, signal.SIGHUP):  # a shell's background jobs ignore them
        signal.signal(taken, signal.default_int_handler)
    configs = given.configs.split(",")
    given.folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        if "stream" in configs:
            hub = stack.enter_context(HubServer())
            rows = "".join(json.dumps({"text": fact}) + "\n" for fact in facts()[:300])
            hub.add_repo("me/text", "dataset", {"train.jsonl": rows.encode()})
            os.environ |= hub.env(given.folder, "hf_read")
        # after the Hub's address is set, and before the forks: no child pays for it
        import hfsft.data.text
        import hfsft.train.finishing
        import hfsft.train.stage
        import hfsft.train.trainer  # noqa: F401

        failed = False
        for name in configs:
            # ranks draw other masks of the attention's weights than one process
            dropout = 0.0 if CONFIGS[name].draws else MODEL["attention_dropout"]
            folder = given.folder / f"dropout-{dropout}"
            recipe = prepare(folder, dropout, CONFIGS[name].stage)
            seen = rounds(name, recipe, given.rounds, number, random.Random(f"{given.seed}:{name}"))
            print(
                f"{name}: " + ", ".join(f"{count} {what}" for what, count in seen.items()),
                flush=True,
            )
            failed = failed or seen["mismatches"] or seen["other statuses"]
    sys.exit(bool(failed))


def harness(folder: Path, *arguments: str) -> str:
    """Run this file as a command, which must succeed; returns what it printed."""
    done = subprocess.run(
        [sys.executable, __file__, str(folder), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


if __name__ == "__main__":
    main()

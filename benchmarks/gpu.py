"""What a card does: memory against the plan, steps, the 200-step job, base, and `auto`.

    python benchmarks/gpu.py [--parts plan,step] [--memory 8] [--data CHATS.jsonl] [--model FOLDER]
    python benchmarks/gpu.py --device cpu --tiny      # every part once, on a CPU, in minutes

Each part is a process of its own (--tiny: one for all) under a cap of --memory GB. Results are kept
in benchmarks/results/CARD.json after every row, and the same command resumes, with rows that failed
tried again; --restart begins anew.
Models are randomly initialised: d8 is the 92 M NanoChat of recipes/nanochat-d8.yaml, smol has the
shape of SmolLM2-135M. Without --data the conversations are those of the built-in tasks.
"""

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import step as steps

RESULTS = Path(__file__).resolve().parent / "results"
AGAIN = 3  # exit status of a part that wants to continue in a new process
PARTS = ("plan", "step", "job", "base", "auto", "sweep")
SHAPES: dict[str, dict[str, Any]] = {
    "d8": {"depth": 8, "vocab_size": 65536},
    "d12": {"depth": 12, "vocab_size": 65536},
    "d20": {"depth": 20, "vocab_size": 65536},
    "smol": {"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536,
             "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
             "vocab_size": 49152, "tie_word_embeddings": True},
    "1.1b": {"model_type": "llama", "hidden_size": 2048, "intermediate_size": 5632,
             "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4,
             "vocab_size": 32000},
    "tiny": {"depth": 1, "vocab_size": 8192},
}  # fmt: skip
PLAIN = "--gradient_checkpointing false --optim adamw_torch_fused"
SMALL = "--gradient_checkpointing true --optim adamw_bnb_8bit"
# shape, tokens a row, rows of a micro-batch, settings
PLANS = [
    *((shape, length, 4, PLAIN) for shape in ("d8", "smol") for length in (512, 1024, 2048)),
    *((shape, length, 4, SMALL) for shape in ("d8", "smol") for length in (512, 1024, 2048)),
    ("d8", 1024, 4, f"{SMALL} --lora.r 16"),
    ("smol", 1024, 4, f"{SMALL} --lora.r 16"),
    ("smol", 1024, 4, f"{SMALL} --lora.r 16 --load_in_4bit true"),
    ("d8", 1024, 4, "--gradient_checkpointing true --optim paged_adamw_8bit"),
    ("1.1b", 1024, 1, f"{SMALL} --lora.r 16 --dtype bfloat16"),
    ("1.1b", 1024, 1, f"{SMALL} --lora.r 16 --load_in_4bit true"),
]
# variants of stock SFTTrainer that need a package: its name for pip, and for Python
KERNELS = {"padding_free": ("flash-attn", "flash_attn"), "liger": ("liger-kernel", "liger_kernel")}
TINY_PLANS = [
    ("tiny", 64, 2, PLAIN),
    ("tiny", 64, 2, SMALL),
    ("tiny", 64, 2, f"{SMALL} --lora.r 4"),
]


def main() -> None:
    """Run the parts, each in a process, and print the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--parts", default=",".join(PARTS[:-1]))
    parser.add_argument("--memory", type=float, default=8.0, help="GB of the card to use")
    path = os.path.abspath  # a part works in another folder
    parser.add_argument("--data", type=path, help=".jsonl; default: the built-in tasks")
    parser.add_argument("--model", type=path, help="a folder: sweep fast.yaml's learning rate")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="to try the program")
    parser.add_argument("--folder", type=path, default="/tmp/hfsft-gpu", help="for models and runs")
    parser.add_argument("--results", type=path, default=str(RESULTS))
    parser.add_argument("--restart", action="store_true", help="discard the results so far")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if given.child:
        for part in given.child.split(","):
            Part(given).run(part)
        return
    if given.device == "cpu" and not given.tiny:
        parser.error("--device cpu tries the program, with --tiny")
    import torch

    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA GPU here; --device cpu --tiny tries the program")
    wanted = given.parts.split(",")
    if (given.model or given.tiny) and "sweep" not in wanted:
        wanted.append("sweep")
    if unknown := set(wanted) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    arguments = [word for word in sys.argv[1:] if word != "--restart"]
    file = results_file(given)
    if given.restart:
        file.unlink(missing_ok=True)
    if file.is_file():  # what failed then is tried again
        found = json.loads(file.read_text())
        found["rows"] = {key: row for key, row in found["rows"].items() if "failed" not in row}
        file.write_text(json.dumps(found, indent=1) + "\n")
    # --tiny in one process, whose start takes longer than most parts
    for part in [",".join(wanted)] if given.tiny else wanted:
        began = time.perf_counter()
        command, status = [sys.executable, __file__, *arguments, "--child", part], AGAIN
        while status == AGAIN:
            status = subprocess.run(command).returncode
        print(f"{part}: {time.perf_counter() - began:.0f} s, exit status {status}", flush=True)
    print(tables(json.loads(file.read_text())))


def results_file(given: argparse.Namespace) -> Path:
    """The file of this card's results."""
    if given.device == "cpu":
        return Path(given.results) / "cpu-tiny.json"
    import torch

    return Path(given.results) / f"{torch.cuda.get_device_name().replace(' ', '-')}.json"


class Part:
    """One part, in its process: rows that are not in the results yet."""

    def __init__(self, given: argparse.Namespace):
        """Set the device up."""
        import torch

        self.given, self.file = given, results_file(given)
        self.cuda = given.device == "cuda"
        self.device = torch.device(given.device)
        self.folder = Path(given.folder) / ("tiny" if given.tiny else "full")
        self.folder.mkdir(parents=True, exist_ok=True)
        os.chdir(self.folder)
        if self.cuda:
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, given.memory * 1e9 / total))
        if given.tiny:
            steps.EXAMPLES, steps.LENGTH = 4, 128
        self.results = {"machine": self.machine(), "rows": {}}
        if self.file.is_file():
            self.results = json.loads(self.file.read_text())

    def machine(self) -> dict[str, Any]:
        """What the figures hold for."""
        import torch

        from hfsft.train.measuring import LIBRARIES, version

        name = torch.cuda.get_device_name() if self.cuda else f"{platform.machine()} CPU"
        found = {"card": name, "memory": self.given.memory, "cuda": torch.version.cuda}
        return found | {library: version(library) for library in LIBRARIES}

    def run(self, part: str) -> None:
        """Run one of `PARTS`."""
        for name, measure in getattr(self, part)():
            key = f"{part}: {name}"
            if key in self.results["rows"]:
                continue
            gc.collect()
            if self.cuda:
                import torch

                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            failed = False
            try:
                found = measure()
            except Exception as error:  # out of memory, too: a row of the table
                found = {"failed": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
                failed = True
            self.results["rows"][key] = found
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.file.write_text(json.dumps(self.results, indent=1) + "\n")
            print(key, json.dumps(found)[:400], flush=True)
            if failed:  # its memory is not free: the next rows get a new process
                sys.exit(AGAIN)

    # --- what the parts share ---

    def model_folder(self, shape: str) -> Path:
        """A folder with a randomly initialised model of a shape, and a tokenizer."""
        import torch

        from hfsft.data.tasks import facts
        from hfsft.tokens.tokenizer import train_tokenizer

        folder = self.folder / shape
        if not (folder / "chat_template.jinja").is_file():
            model = self.build(shape)
            if shape == "1.1b":
                model = model.to(torch.bfloat16)
            model.save_pretrained(folder)
            del model
            train_tokenizer(facts(), 512).save_pretrained(folder)
        return folder

    def build(self, shape: str) -> Any:
        """A model of a shape, on the device."""
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        from hfsft.model.loading import nanochat_config

        settings = dict(SHAPES[shape]) | {"max_position_embeddings": 2048}
        special = {"bos_token_id": 0, "eos_token_id": 4, "pad_token_id": 9}
        if "depth" in settings:
            config = nanochat_config(settings.pop("depth"), **settings, **special)
        else:
            config = AutoConfig.for_model(settings.pop("model_type"), **settings, **special)
        torch.manual_seed(0)
        with self.device:
            return AutoModelForCausalLM.from_config(config)

    def chats(self, full: bool) -> str:
        """Rows that fill any length if `full`, else those of --data, or of the built-in tasks."""
        if not full:
            if self.given.data:
                return f"[{{path: {self.given.data}}}]"
            return "[{path: identity, rows: 400}, {path: spelling_bee, rows: 1200}]"
        path = self.folder / "full.jsonl"
        if not path.is_file():
            from hfsft.data.tasks import facts

            text = " ".join(facts())
            with path.open("w") as file:
                for start in range(64):
                    words = text[start * 500 : start * 500 + 16000]
                    turns = [{"role": "user", "content": f"{start}?"}]
                    turns.append({"role": "assistant", "content": words})
                    file.write(json.dumps({"messages": turns}) + "\n")
        return f"[{{path: {path}}}]"

    def recipe(self, shape: str, full: bool = False) -> Path:
        """A recipe that fine-tunes a model of a shape."""
        path = self.folder / f"{shape}-{'full' if full else 'chats'}.yaml"
        path.write_text(
            f"name: {shape}\noutput_dir: {self.folder / 'runs'}\nsft:\n"
            f"  model_name_or_path: {self.model_folder(shape)}\n"
            f"  data: {self.chats(full)}\n"
            f"  held_out: 0\n  assistant_only_loss: {'false' if full else 'true'}\n"
            f"  max_length: {64 if self.given.tiny else 1024}\n  save_strategy: 'no'\n"
            f"  on_bad_rows: skip\n  memory_limit: {self.given.memory}GB\n"
        )
        return path

    # --- the parts: name and measurement of each row ---

    def plan(self) -> Iterator[tuple[str, Callable[[], dict]]]:
        """The plan's peak and seconds beside what a stage then takes."""
        for setting in TINY_PLANS if self.given.tiny else PLANS:
            shape, length, rows, settings = setting
            name = f"{shape}, {rows} x {length}, {settings.replace('--', '')}"
            yield name, lambda setting=setting: self.planned(*setting)

    def planned(self, shape: str, length: int, rows: int, settings: str) -> dict[str, Any]:
        """Run four steps of full rows; bytes are those of this stage alone."""
        import torch

        from hfsft import sft
        from hfsft.plan.choosing import plan_run
        from hfsft.recipe.loading import load_recipe

        argv = [str(self.recipe(shape, full=True)), *settings.split()]
        argv += f"--max_length {length} --per_device_train_batch_size {rows}".split()
        argv += f"--examples_per_step {2 * rows} --max_steps 4 --logging_steps 1 --quiet".split()
        argv += ["--restart"]
        plan = plan_run(load_recipe(*argv, stage="sft"))["stages"]["sft"]
        before = 0
        if self.cuda:  # building the model took memory, too
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        sft.main(*argv)
        folder = self.folder / "runs" / shape / "sft"
        record = json.loads((folder / "stage.json").read_text())
        log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        found = {"planned": plan["peak"] - plan["overhead"], "planned_s": plan["seconds_per_step"]}
        seconds = [line["seconds"] for line in log if "loss" in line]
        found["seconds"] = (seconds[-1] - seconds[1]) / 2
        if self.cuda:
            free, total = torch.cuda.mem_get_info()
            found["allocated"] = record["peak_allocated_bytes"] - before
            found["reserved"] = record["peak_memory_bytes"]
            found["outside_torch"] = total - free - torch.cuda.memory_reserved()
        return found

    def step(self) -> Iterator[tuple[str, Callable[[], dict]]]:
        """The same conversations through hfsft, a bare loop, and stock SFTTrainer."""
        variants = [*steps.VARIANTS, *KERNELS]
        for shape in ("tiny",) if self.given.tiny else ("d8", "smol"):
            for turn in range(1 if self.given.tiny else 2):
                for name in variants:
                    yield f"{shape}, {name}, {turn}", lambda s=shape, n=name: self.one_variant(s, n)

    def one_variant(self, shape: str, variant: str) -> dict[str, Any]:
        """Tokens a second, peak memory, MFU and energy of some steps."""
        package, module = KERNELS.get(variant, (None, None))
        if module and find_spec(module) is None:
            return {"unavailable": f"{package} is not installed"}
        kind = SHAPES[shape].get("model_type", "nanochat")
        if variant == "liger" and not liger_knows(kind):
            return {"unavailable": f"{package} has no kernels for {kind}"}
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        count = 4 if self.given.tiny else 6
        steps.ROWS = 16 if variant in ("hfsft", "bare") else 2
        folder = self.folder / "step"
        folder.mkdir(exist_ok=True)

        def make(size: int) -> Any:
            model = self.build(shape)
            if variant == "padding_free":  # other attention would not separate the documents
                model.set_attn_implementation("flash_attention_2")
            return model

        found = steps.run(variant, make, self.given.data, str(folder), count)
        card = self.results["machine"]["card"]
        if peak := next((flops for name, flops in steps.PEAK_FLOPS.items() if name in card), None):
            found["mfu"] = 6 * found["matmul_parameters"] * found["tokens_a_second"] / peak
        return found

    def job(self) -> Iterator[tuple[str, Callable[[], dict]]]:
        """200 steps of 32 conversations, from the command to the finished folder."""
        for shape in ("tiny",) if self.given.tiny else ("d8", "smol"):
            yield shape, lambda shape=shape: self.whole_job(shape)

    def whole_job(self, shape: str) -> dict[str, Any]:
        """Seconds of the command, and the stage's own figures."""
        count, size = (4, 8) if self.given.tiny else (200, 32)
        command = [sys.executable, "-m", "hfsft", "sft", str(self.recipe(shape)), "--restart"]
        command += f"--name job-{shape} --max_steps {count} --examples_per_step {size}".split()
        command += ["--per_device_train_batch_size", "auto", "--gradient_checkpointing", "auto"]
        command += ["--optim", "adamw_bnb_8bit", "--save_strategy", "steps"]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(RESULTS.parent.parent), *sys.path])
        }
        began = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        seconds = time.perf_counter() - began
        if done.returncode:
            raise RuntimeError(done.stderr.strip().splitlines()[-1])
        record = json.loads(
            (self.folder / "runs" / f"job-{shape}" / "sft" / "stage.json").read_text()
        )
        keys = ("steps", "tokens", "seconds", "peak_memory_bytes", "peak_allocated_bytes", "chosen")
        return {"command_s": seconds} | {key: record.get(key) for key in keys}

    def base(self) -> Iterator[tuple[str, Callable[[], dict]]]:
        """Tokens a second of base steps."""
        shapes = ("tiny",) if self.given.tiny else ("d8", "d20", "d12")
        for optim in ("adamw_bnb_8bit", "muon"):
            for shape in shapes:
                if (shape, optim) == ("d20", "muon"):
                    continue  # 7.4 GB of weights, gradients and states, of 8
                for compiled in (False, True):
                    name = f"{shape}, {optim}{', compiled' * compiled}"
                    yield name, lambda s=shape, o=optim, c=compiled: self.base_steps(s, o, c)

    def base_steps(self, shape: str, optim: str, compiled: bool) -> dict[str, Any]:
        """Train on full rows; the first two steps, which compile and allocate, are not counted."""
        steps.ROWS = 2 if shape in ("d20", "tiny") else 8
        settings: dict[str, Any] = {"optim": optim, "gradient_checkpointing": shape == "d20"}
        if compiled:
            settings["torch_compile"] = True
        folder = self.folder / "base"
        folder.mkdir(exist_ok=True)
        count = 4 if self.given.tiny else 6
        return steps.run(
            "hfsft", lambda size: self.build(shape), None, str(folder), count, True, **settings
        )

    def auto(self) -> Iterator[tuple[str, Callable[[], dict]]]:
        """What `auto` chose, and its neighbours."""
        from hfsft.plan.choosing import choose
        from hfsft.recipe.loading import load_recipe

        for shape in ("tiny",) if self.given.tiny else ("d8", "smol"):
            argv = [str(self.recipe(shape)), "--max_steps", "5" if self.given.tiny else "12"]
            argv += ["--examples_per_step", "4" if self.given.tiny else "32"]
            argv += ["--logging_steps", "1", "--restart", "--quiet"]
            automatic = (
                "--per_device_train_batch_size auto --gradient_checkpointing auto --optim auto"
            )
            recipe = load_recipe(*argv, *automatic.split(), stage="sft")
            chosen = choose(recipe, recipe.sft)[0].trainer
            rows = chosen["per_device_train_batch_size"]
            checkpointing = chosen["activation_checkpointing"]
            settings = {
                "chosen": (rows, checkpointing),
                "half the rows": (max(1, rows // 2), checkpointing),
                "two rows": (2, checkpointing),
                "checkpointing toggled": (rows, not checkpointing),
            }
            for name, (count, on) in settings.items():
                more = f"--per_device_train_batch_size {count} --optim {chosen['optim']}".split()
                more += ["--gradient_checkpointing", str(on).lower(), "--ignore_plan"]
                text = f"{shape}, {name}: {count} rows, checkpointing {on}, {chosen['optim']}"
                yield text, lambda argv=argv, more=more: self.short_run([*argv, *more])

    def short_run(self, argv: list[str]) -> dict[str, Any]:
        """Tokens a second of a few steps of a recipe, without the first two."""
        from hfsft import sft
        from hfsft.recipe.loading import load_recipe

        sft.main(*argv)
        folder = load_recipe(*argv, stage="sft").sft.folder
        log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        log = [line for line in log if "loss" in line]
        record = json.loads((folder / "stage.json").read_text())
        return {
            "tokens_a_second": (log[-1]["tokens"] - log[1]["tokens"])
            / (log[-1]["seconds"] - log[1]["seconds"]),
            "micro_batch_rows": record["micro_batch_rows"],
            "peak_memory_bytes": record["peak_memory_bytes"],
        }

    def sweep(self) -> Iterator[tuple[str, Callable[[], dict]]]:
        """Validation loss of fast.yaml's stage at several learning rates."""
        for rate in ("3e-4",) if self.given.tiny else ("1e-4", "2e-4", "3e-4", "6e-4", "1e-3"):
            yield rate, lambda rate=rate: self.one_rate(rate)

    def one_rate(self, rate: str) -> dict[str, Any]:
        """Run the stage with one learning rate."""
        from hfsft import sft

        model = self.model_folder("tiny") if self.given.model is None else self.given.model
        argv = [str(RESULTS.parent.parent / "recipes" / "fast.yaml"), "--restart", "--quiet"]
        argv += ["--model_name_or_path", str(model), "--data", self.chats(False)]
        argv += ["--learning_rate", rate, "--name", f"sweep-{rate}"]
        argv += ["--output_dir", str(self.folder), "--on_bad_rows", "skip"]
        argv += ["--per_device_train_batch_size", "auto", "--gradient_checkpointing", "auto"]
        if self.given.tiny:
            argv += ["--max_steps", "4", "--examples_per_step", "4", "--max_length", "64"]
            argv += ["--held_out", "8"]
        else:
            argv += ["--held_out", "100"]
        sft.main(*argv)
        record = json.loads((self.folder / f"sweep-{rate}" / "sft" / "stage.json").read_text())
        return {key: record[key] for key in ("steps", "eval_loss_before", "eval_loss")}


def liger_knows(model_type: str) -> bool:
    """Whether liger-kernel patches such models: it leaves others as they are, with a warning."""
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    return model_type in MODEL_TYPE_TO_APPLY_LIGER_FN


# --- tables ---


def tables(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    machine = results["machine"]
    lines = [f"{machine['card']}, capped at {machine['memory']} GB; torch {machine['torch']}, "
             f"transformers {machine['transformers']}, trl {machine['trl']}"]  # fmt: skip
    for part in PARTS:
        rows = {
            key.removeprefix(f"{part}: "): found
            for key, found in results["rows"].items()
            if key.startswith(f"{part}: ")
        }
        if rows:
            lines += ["", f"### {part}", "", *_table(medians(rows) if part == "step" else rows)]
    return "\n".join(lines)


def medians(rows: dict[str, dict]) -> dict[str, dict]:
    """Rows that were repeated, as medians."""
    grouped: dict[str, list[dict]] = {}
    for name, found in rows.items():
        grouped.setdefault(name.rpartition(", ")[0], []).append(found)
    keys = ("tokens_a_second", "peak_bytes", "mfu", "joules", "micro_batch_rows")
    return {
        name: {
            key: statistics.median(found[key] for found in several)
            for key in keys
            if all(key in found for found in several)
        }
        or several[0]
        for name, several in grouped.items()
    }


def _table(rows: dict[str, dict]) -> list[str]:
    columns = list(dict.fromkeys(key for found in rows.values() for key in found))
    hidden = ("losses", "idle_bytes", "parameters", "matmul_parameters")
    columns = [key for key in columns if key not in hidden]
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, found in rows.items():
        cells = [_cell(key, found.get(key)) for key in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _cell(key: str, value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if value > 1000 else f"{value:.3g}"
    if isinstance(value, int) and value > 10**6 and key != "tokens":
        return f"{value / 1e6:,.0f} MB"
    return "" if value is None else str(value)


if __name__ == "__main__":
    main()

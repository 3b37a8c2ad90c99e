"""How often the intervals of `hfsft.train.advice` held, and whether its verdicts were right.

    python benchmarks/advice.py                # the table, in a minute
    python benchmarks/advice.py --train        # rebuild curves.json first: 80 runs, an hour
    python benchmarks/advice.py --train_new    # rebuild new_curves.json: 32 runs

Advice is requested at half and at three quarters of a run's planned steps and at their end, with 4
to 24 validations in all. The truth is the final loss of another run with that many steps and a
learning-rate schedule of its own; for the planned end it is the run itself. `below` and `above` are
the shares of truths below and above the interval. A verdict was right in hindsight if training
from the planned end to the steps that it named (or twice as many) lowered the loss by at least 1%
(to continue) or by less (`stop`); for `stop now`, from the current step to the planned end.

The real curves are from tiny byte-level Llamas on the embedded data, with linear and
warmup_stable_decay schedules: `text` and `tasks` from scratch, `style`, `spelling` and `few` (200
conversations, up to 28 epochs) from a model that was trained on both.

The constants of advice.py were tuned on the rows marked *; of the real curves, those of seed 2
under warmup_stable_decay were trained afterwards. After a first look at all rows two faults were
fixed: repeated data no longer makes it certain that the loss rises (`few` and `overfitting`, hence
their *), and nothing is projected beyond 4 times the steps done. LATE was added later, after a
look at all real curves, whose longer runs gained more than projected. The rows called new are of
curves trained after that: other data, shapes, rates and a cosine schedule.
"""

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from hfsft.train.advice import RATE, WORTH, Validation, advise

CURVES = Path(__file__).with_name("curves.json")
NEW_CURVES = Path(__file__).with_name("new_curves.json")
SHARES = (0.5, 0.75, 1)  # of the planned steps, at which advice is requested
ASKED = ("0.5 → 1", "0.5 → 2", "0.5 → 4", "0.75 → 1", "1 → 1.5", "1 → 2", "1 → 4")
DECAY = 5  # under warmup_stable_decay the learning rate decays over the last fifth

# --- generated curves: a function of (total steps, decaying steps) → the loss after each step ---

Curve = Callable[[int, int | None], np.ndarray]
# Luo et al. (2025), A Multi-Power Law for Loss Curve Prediction: released fits for 25, 100 and
# 400 M parameters: floor, A, alpha, B, C, beta, gamma
MULTI_POWER = (
    (3.040, 0.525, 0.508, 363.788, 2.066, 0.583, 0.641),
    (2.651, 0.601, 0.453, 437.946, 2.132, 0.598, 0.655),
    (2.375, 0.654, 0.429, 523.425, 2.025, 0.594, 0.635),
)
# Hoffmann et al. (2022), and the replication by Besiroglu et al. (2024): E, A, alpha, B, beta
CHINCHILLA = ((1.69, 406.4, 0.34, 410.7, 0.28), (1.8172, 482.01, 0.3478, 2085.43, 0.3658))


def rates(total: int, decay: int | None) -> np.ndarray:
    """The learning rate of each step relative to its peak; None decays from the first step."""
    return np.clip((total - np.arange(total)) / (decay or total), 0, 1)


def saturating(random: np.random.Generator, plan: int) -> tuple[Curve, int | None]:
    """Between a power law and an exponential in the summed rates, plus a term in the rate."""
    floor, fall = random.uniform(0.2, 3), random.uniform(0.05, 2)
    time, power = plan * math.exp(random.uniform(-3, 1)), random.choice([0.3, 0.6, 1.2, 3, 20])
    effect = random.uniform(0, 0.15)

    def curve(total: int, decay: int | None) -> np.ndarray:
        rate = rates(total, decay)
        shape = (1 + rate.cumsum() / (power * time)) ** -power
        return floor + fall * shape + effect * np.append(rate[1:], 0)

    return curve, None


def two_falls(random: np.random.Generator, plan: int) -> tuple[Curve, int | None]:
    """The same plus a skill learned at some point, possibly after the planned end."""
    smooth, _ = saturating(random, plan)
    height, at = random.uniform(0.05, 0.6), plan * random.uniform(0.1, 1.2)

    def curve(total: int, decay: int | None) -> np.ndarray:
        progress = rates(total, decay).cumsum()
        return smooth(total, decay) + height / (1 + (progress / at) ** 4)

    return curve, None


def plateaued(random: np.random.Generator, plan: int) -> tuple[Curve, int | None]:
    """An exponential that has converged by the planned end, almost independent of the rate."""
    floor, fall = random.uniform(0.2, 3), random.uniform(0.05, 2)
    time, effect = plan * random.uniform(0.03, 0.12), random.uniform(0, 0.005) * floor

    def curve(total: int, decay: int | None) -> np.ndarray:
        rate = rates(total, decay)
        return floor + fall * np.exp(-rate.cumsum() / time) + effect * np.append(rate[1:], 0)

    return curve, None


def overfitting(random: np.random.Generator, plan: int) -> tuple[Curve, int | None]:
    """Rises after four epochs, which end between a fifth and four fifths of the plan."""
    smooth, _ = saturating(random, plan)
    slope, at = random.uniform(0.05, 0.5), plan * random.uniform(0.2, 0.8)

    def curve(total: int, decay: int | None) -> np.ndarray:
        progress = rates(total, decay).cumsum()
        return smooth(total, decay) + slope * np.clip(progress - at, 0, None) / plan

    return curve, math.ceil(at / 4)


def multi_power(random: np.random.Generator, plan: int) -> tuple[Curve, int | None]:
    """The published law, scaled to 24,000 of its steps per plan, at its peak rate of 3e-4."""
    floor, a, alpha, b, c, beta, gamma = MULTI_POWER[random.integers(3)]
    each = 24000 / plan  # its steps per step of ours

    def curve(total: int, decay: int | None) -> np.ndarray:
        rate = 3e-4 * np.append(rates(total, decay), 1e-9)
        progress = rate[1:].cumsum() * each
        since = np.tril(progress[:, None] - np.append(0, progress[:-1]))
        lost = 1 - (c * rate[1:] ** -gamma * since + 1) ** -beta
        annealed = (np.tril(lost) * (rate[:-1] - rate[1:])).sum(axis=1)
        return floor + a * (progress + 0.3) ** -alpha - b * annealed

    return curve, None


def chinchilla(random: np.random.Generator, plan: int) -> tuple[Curve, int | None]:
    """The published law for final losses; within a run, plus a term proportional to the rate."""
    floor, a, alpha, b, beta = CHINCHILLA[random.integers(2)]
    size = 10 ** random.uniform(7, 9)
    tokens = 20 * size / plan * random.uniform(0.3, 3)  # per step
    effect = random.uniform(0.02, 0.12)

    def curve(total: int, decay: int | None) -> np.ndarray:
        rate = rates(total, decay)
        seen = rate.cumsum() * (2 if decay is None else 1) * tokens
        return floor + a / size**alpha + b / seen**beta + effect * np.append(rate[1:], 0)

    return curve, None


def annealing(random: np.random.Generator, plan: int) -> tuple[Curve, int | None]:
    """The form of Tissue et al. (2024), whose annealing lags behind the rate; random parameters."""
    floor, fall, power = random.uniform(1.5, 3), random.uniform(0.2, 1), random.uniform(0.3, 0.7)
    gain, lag = random.uniform(0.01, 0.06), plan * random.uniform(0.02, 0.1)

    def curve(total: int, decay: int | None) -> np.ndarray:
        rate = rates(total, decay)
        momentum, area, found = 0.0, 0.0, []
        for drop in -np.diff(rate, append=0):
            momentum = momentum * math.exp(-1 / lag) + drop
            area += momentum / lag
            found.append(area)
        progress = (rate.cumsum() + plan / 50) / plan
        return floor + fall * progress**-power - gain * floor * np.array(found)

    return curve, None


class HeldOut:
    """Conversations whose mean follows a curve; each has its own level and rate of improvement."""

    def __init__(self, random: np.random.Generator):
        count = int(random.choice([8, 50, 200, 500]))
        self.random, self.tokens = random, random.integers(10, 300, count)
        self.own, self.pace = random.normal(0, 0.3, (2, count))
        self.jitter = random.uniform(0.005, 0.04)  # of each document between validations
        self.common = random.uniform(0, 0.003)  # of the mean, relative: the optimizer wanders

    def validation(self, step: int, loss: float, first: float) -> Validation:
        """The losses of all conversations where the curve is at `loss`, starting from `first`."""
        each = self.own + self.pace * (loss - first)
        each -= each @ self.tokens / self.tokens.sum()
        each += self.random.normal(0, self.jitter, len(each))
        mean = loss * (1 + self.random.normal(0, self.common))
        return Validation(step, (mean + each) * self.tokens, self.tokens)


def generated(family: Callable, seed: int, count: int) -> Iterator[dict[str, Any]]:
    """Runs of a family: validations, log lines, and final losses of runs of other lengths."""
    for number in range(count):
        random = np.random.default_rng([seed, number])
        plan = int(random.choice([48, 200, 480]))
        curve, epoch = family(random, plan)
        decay = None if random.random() < 0.6 else DECAY
        held_out, loss = HeldOut(random), curve(plan, decay and plan // decay)
        every = max(1, plan // int(random.choice([4, 8, 20])))
        offset, noise = random.normal(0, 0.03), random.uniform(0.005, 0.05)
        validations = [
            held_out.validation(step, loss[max(step - 1, 0)], loss[0])
            for step in range(0, plan + 1, every)
        ]
        train = [
            (step, loss[step - 10 : step].mean() * (1 + offset + random.normal(0, noise)))
            for step in range(10, plan + 1, 10)
        ]
        ends = {
            steps: held_out.validation(
                steps, curve(steps, decay and steps // decay)[-1], loss[0]
            ).loss
            for steps in (plan * 3 // 2, plan * 2, plan * 4)
        }
        yield {
            "plan": plan,
            "decay_from": decay and plan - plan // decay,
            "epoch": epoch or 4 * plan,
            "validations": validations,
            "train": train,
            "ends": ends,
        }


# --- real curves ---

LENGTH, BATCH = 96, 12  # bytes per conversation at most, conversations per step
START, USER, ASSISTANT, END = range(256, 260)
SCHEDULES = ("linear", "warmup_stable_decay")
NEW_SCHEDULES = ("cosine", "warmup_stable_decay")
SCRATCH = ("text", "tasks", "facts", "sums")  # kinds that start from a random model
SHAPES = {"facts": (128, 3), "sums": (64, 4)}  # width and layers, where not those of the others
STEPS = (50, 100, 200, 400)  # of the last, only the end is kept
HELD_OUT, VALIDATED = 32, 28  # conversations; with all of them curves.json exceeds 100 KB
RATES = {"text": 3e-3, "tasks": 3e-3, "style": 5e-4, "spelling": 2e-3, "few": 2e-3}
NEW_RATES = {"facts": 2e-3, "sums": 4e-3, "counts": 1e-3, "talk": 3e-4}
Example = tuple[list[int], list[bool]]  # bytes and markers, and which of them are trained on


def chats(rows: dict[str, int], seed: int) -> list[Example]:
    """Conversations of the built-in tasks, shuffled."""
    from hfsft.data.tasks import task_rows

    found = []
    for name, count in rows.items():
        for row in task_rows(name, count, seed=seed):
            ids, trained = [START], [False]
            for message in row["messages"]:
                own, text = message["role"] == "assistant", message["content"].encode()
                ids += [ASSISTANT if own else USER, *text, END]
                trained += [False, *[own] * (len(text) + 1)]
            found.append((ids[:LENGTH], trained[:LENGTH]))
    Random(seed).shuffle(found)
    return found


def texts(rows: int, seed: int) -> list[Example]:
    """Excerpts of the embedded speeches."""
    from hfsft.data.tasks import speeches

    random, documents, found = Random(seed), speeches(), []
    for _ in range(rows):
        document = random.choice(documents)
        at = random.randrange(len(document) - 200)
        ids = [START, *document[at : at + LENGTH].encode()][:LENGTH]
        found.append((ids, [True] * len(ids)))
    return found


def lines(seed: int) -> list[Example]:
    """The embedded facts."""
    from hfsft.data.tasks import facts

    found = [[START, *fact.encode()][:LENGTH] for fact in facts()]
    Random(seed).shuffle(found)
    return [(ids, [True] * len(ids)) for ids in found]


def data(kind: str, seed: int) -> list[Example]:
    """The held-out examples of a kind, followed by the training examples."""
    talk = ("identity", "small_talk")
    if kind == "text":
        return texts(6000, seed)
    if kind == "facts":
        return lines(seed)
    rows = {
        "sums": {"arithmetic": 6000},
        "counts": {"spelling_bee": 4000},
        "talk": {"small_talk": 500, "arithmetic": 1000, "identity": 100},
        "tasks": dict.fromkeys(talk, 800) | {"simple_spelling": 3000, "arithmetic": 1500},
        "style": dict.fromkeys(talk, 3000),
        "spelling": {"simple_spelling": 5000, "spelling_bee": 1000},
        "few": dict.fromkeys(talk, 70) | {"arithmetic": 60},
    }
    return chats(rows[kind], seed)


def fresh_model(seed: int, width: int = 96, layers: int = 2) -> Any:
    """A byte-level Llama, by default of 0.25 M parameters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def token_losses(model: Any, examples: list[Example]) -> tuple[Any, Any]:
    """Summed loss and number of trained tokens of each example."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    ids = pad_sequence([torch.tensor(ids) for ids, _ in examples], batch_first=True)
    trained = pad_sequence([torch.tensor(marks) for _, marks in examples], batch_first=True)[:, 1:]
    logits = model(input_ids=ids).logits[:, :-1].transpose(1, 2)
    losses = torch.nn.functional.cross_entropy(logits, ids[:, 1:], reduction="none")
    return (losses * trained).sum(1), trained.sum(1)


def train_run(
    model: Any, examples: list[Example], steps: int, rate: float, schedule: str, seed: int
) -> dict[str, Any]:
    """Train on all but the first examples, and validate on those every eighth of the run."""
    import torch
    from transformers import get_scheduler

    held_out, examples = examples[:VALIDATED], examples[HELD_OUT:]
    optimizer = torch.optim.AdamW(model.parameters(), rate, betas=(0.9, 0.95), weight_decay=0)
    decays = {"num_decay_steps": steps // DECAY} if schedule == "warmup_stable_decay" else {}
    scheduler = get_scheduler(schedule, optimizer, math.ceil(steps / 50), steps, decays)
    random, order, recent = Random(seed), [], []
    while len(order) < steps * BATCH:
        order += random.sample(range(len(examples)), len(examples))
    found: dict[str, Any] = {"validations": [], "train": []}
    for step in range(steps + 1):
        if step % (steps // 8) == 0 or step == steps:
            with torch.no_grad():
                losses, tokens = token_losses(model, held_out)
            found["tokens"] = tokens.tolist()
            millis = (losses.double() / tokens * 1000).round().int().tolist()
            found["validations"].append([step, millis])  # thousandths of a nat per token
        if step == steps:
            return found
        batch = [examples[number] for number in order[step * BATCH : (step + 1) * BATCH]]
        losses, tokens = token_losses(model, batch)
        loss = losses.sum() / tokens.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        recent.append(loss.item())
        if len(recent) == 10:
            found["train"].append([step + 1, round(sum(recent) * 100)])
            recent = []


def train_curves(
    path: Path, rates: dict[str, float], schedules: Iterable[str], seeds: Iterable[int]
) -> None:
    """Train every kind, schedule, seed and number of steps, and write the curves."""
    import torch

    from hfsft.data.tasks import TASKS

    torch.set_num_threads(1)
    start = fresh_model(0)
    examples = texts(HELD_OUT, 8) + texts(8000, 7) + chats(dict.fromkeys(TASKS, 400), 7)
    train_run(start, examples, 400, 3e-3, "linear", 0)
    curves = []
    for seed in seeds:
        for schedule in schedules:
            for kind, rate in rates.items():
                examples = data(kind, seed)
                epoch = math.ceil((len(examples) - HELD_OUT) / BATCH)
                one = {"kind": kind, "schedule": schedule, "seed": seed, "epoch": epoch, "runs": {}}
                for steps in STEPS:
                    model = fresh_model(seed, *SHAPES.get(kind, ()))
                    if kind not in SCRATCH:
                        model.load_state_dict(start.state_dict())
                    run = train_run(model, examples, steps, rate, schedule, seed)
                    one["tokens"] = run.pop("tokens")
                    if steps == STEPS[-1]:
                        run = {"validations": run["validations"][-1:], "train": []}
                    one["runs"][steps] = run
                curves.append(one)
                print(f"{kind} {schedule} {seed}", flush=True)
                path.write_text(json.dumps(curves, separators=(",", ":")) + "\n")


def real(
    kinds: Iterable[str], unseen: bool, plans: Iterable[int], path: Path = CURVES
) -> Iterator[dict[str, Any]]:
    """The recorded runs of some kinds, with all validations and with every second one."""
    for one in json.loads(path.read_text()):
        new = path != CURVES or (one["seed"] == 2 and one["schedule"] != "linear")
        if one["kind"] not in kinds or new != unseen:
            continue
        tokens = np.array(one["tokens"])
        runs = {int(steps): run for steps, run in one["runs"].items()}
        seen = {
            steps: [
                Validation(step, np.array(millis) / 1000 * tokens, tokens)
                for step, millis in run["validations"]
            ]
            for steps, run in runs.items()
        }
        for plan in plans:
            for every in (1, 2):
                yield {
                    "plan": plan,
                    "decay_from": plan - plan // DECAY
                    if one["schedule"] == "warmup_stable_decay"
                    else None,
                    # four times the plan, as a full epoch is always projected
                    "epoch": one["epoch"] if one["kind"] == "few" else 4 * plan,
                    "validations": [
                        validation
                        for number, validation in enumerate(seen[plan])
                        if number % every == 0 or validation.step == plan
                    ],
                    "train": [(step, millis / 1000) for step, millis in runs[plan]["train"]],
                    "ends": {steps: seen[steps][-1].loss for steps in runs if steps > plan},
                }


# --- the table ---


def judged(runs: Iterable[dict[str, Any]]) -> tuple[dict[str, list], dict[str, list[bool | None]]]:
    """Every interval with the truth and the current loss, and every verdict with its outcome."""
    intervals, verdicts = defaultdict(list), defaultdict(list)
    for run in runs:
        plan, ends = run["plan"], run["ends"] | {run["plan"]: run["validations"][-1].loss}
        for share in SHARES:
            seen = [one for one in run["validations"] if one.step <= share * plan]
            if seen[-1].step < 0.9 * share * plan:
                continue
            train = [(step, loss) for step, loss in run["train"] if step <= share * plan]
            advice = advise(seen, train, plan, run["epoch"], None, run["decay_from"])
            now = seen[-1].loss
            for steps in ends.keys() & advice.projected.keys():
                low, high = advice.projected[steps]
                intervals[f"{share:g} → {steps / plan:g}"].append((low, high, ends[steps], now))
            verdict = advice.says.rpartition(": ")[2]
            kinds = ("stop now", "stop,", "stop at", "continue to")
            kind = next((kind for kind in kinds if verdict.startswith(kind)), "not known")
            named = int(verdict.split()[-1]) if kind == "continue to" else 2 * plan
            gain = 1 - ends.get(named, ends.get(2 * plan, math.nan)) / ends[plan]
            if kind in ("stop now", "stop,"):
                gain = 1 - ends[plan] / now
            if not math.isnan(gain):
                right = (gain >= WORTH) == (kind == "continue to")
                verdicts[kind.rstrip(",").removesuffix(" at").removesuffix(" to")].append(right)
    return intervals, verdicts


def show(name: str, runs: Iterable[dict[str, Any]]) -> None:
    """Print the rows of one family."""
    intervals, verdicts = judged(runs)
    for asked in ASKED:
        if asked not in intervals:
            continue
        low, high, truth, now = np.array(intervals[asked]).T
        inside = (low <= truth) & (truth <= high)
        print(
            f"{name:<21}{asked:<10}{len(truth):7}{RATE:10.0%}{inside.mean():9.0%}"
            f"{(truth < low).mean():7.0%}{(truth > high).mean():7.0%}"
            f"{np.median((high - low) / now):8.1%}{np.median(truth / now - 1):+9.1%}"
        )
    shares = [
        f"{kind} {len(rights)}" + f", right {sum(rights)}" * (kind != "not known")
        for kind, rights in sorted(verdicts.items())
    ]
    print(f"{name:<21}verdicts: {'; '.join(shares)}\n", flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--train", action="store_true", help="rebuild curves.json")
    parser.add_argument("--train_new", action="store_true", help="rebuild new_curves.json")
    chosen = parser.parse_args()
    if chosen.train:
        train_curves(CURVES, RATES, SCHEDULES, (1, 2))
    if chosen.train_new:
        train_curves(NEW_CURVES, NEW_RATES, NEW_SCHEDULES, (3,))
    print(
        f"{'curves':<21}{'asked':<10}{'count':>7}{'nominal':>10}{'covered':>9}{'below':>7}"
        f"{'above':>7}{'width':>8}{'change':>9}"
    )
    for unseen, mark in ((False, "*"), (True, "")):
        show(f"real, scratch, 50 {mark}", real(("text", "tasks"), unseen, (50,)))
        show(f"real, scratch {mark}", real(("text", "tasks"), unseen, (100, 200)))
        show(f"real, trained {mark}", real(("style", "spelling"), unseen, (50, 100, 200)))
        show("real, few *", real(("few",), unseen, (50, 100, 200)))
    new = {"unseen": True, "path": NEW_CURVES}
    show("new, scratch", real(("facts", "sums"), plans=(50, 100, 200), **new))
    show("new, trained", real(("counts", "talk"), plans=(50, 100, 200), **new))
    for family in (saturating, two_falls, plateaued, overfitting):
        show(f"{family.__name__} *", generated(family, 1, 150))
    for family in (multi_power, chinchilla, annealing):
        show(family.__name__, generated(family, 3, 150))


if __name__ == "__main__":
    main()

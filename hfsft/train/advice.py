"""Advice from a loss curve: whether it still falls, and what more steps would gain."""

import itertools
import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from hfsft.noise import ratio_error

RATE = 0.8  # the coverage that the intervals aim at


WORTH = 0.01  # a smaller gain, as a share of the loss, is not worth more steps


VAGUE = 0.4  # a wider interval, as a share of its middle, tells too little


FURTHEST = 4  # times the steps done: beyond, real runs left the intervals too often


Z = 1.645  # one-sided 95%, for a change between two validations


# The curve: floor + fall * shape + slow * log2(way) + effect * rate, where the way is the sum of
# learning rates so far. Shapes are (1 + (way / time) ** delay / bend) ** -bend: power laws for a
# short time, exponentials for a large bend, and a late onset for a delay of 2.
BENDS = (0.25, 0.5, 1.0, 2.0, 8.0, 100.0)


TIMES = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2)  # in units of the way so far


DELAYS = (1.0, 2.0)


# as shares of the loss; fitted on the curves that benchmarks/advice.py marks for tuning
SLOWS = (0.001, 0.05)  # prior scale of a slow fall beside the shape: hardly any, or some


EFFECTS = (0.004, 0.06)  # prior scale of what the full learning rate adds


OFFSET = 0.2  # prior scale of training loss minus validation loss


MISFIT = 0.003  # of a real curve around the fitted one


FAR_MISFIT = 0.1  # the same for early points, as a share of their height above the last


DRIFT = 0.35  # log-standard deviation of a projected change


LATE = 0.5  # the same, one-sided, of a run twice as long or longer: it gained more than projected


EPOCHS = 4  # repeated up to so often, data is nearly as good as new (Muennighoff et al. 2023)


WEAR = 0.1  # share of the loss that each doubling of the epochs may add after that


POINTS = 24  # validations, and log lines, that are fitted; more are averaged in groups


DRAWS = 100  # of the coefficients of each shape


PICKS = 4000  # resampled from all draws by weight


@dataclass(frozen=True)
class Validation:
    """The losses of the held-out documents at one step.

    Args:
        step: optimizer updates done.
        losses: [conversations] float64, nats summed over each one's trained tokens; every
            validation has the same conversations in the same order.
        tokens: [conversations] int64, trained tokens of each.
    """

    step: int
    losses: np.ndarray
    tokens: np.ndarray

    @cached_property
    def loss(self) -> float:
        """Mean loss per trained token, in nats."""
        return float(self.losses.sum() / self.tokens.sum())

    @cached_property
    def error(self) -> float:
        """Standard error of `loss` over conversations, in nats; infinite if there is only one."""
        return ratio_error(self.losses, self.tokens)


@dataclass(frozen=True)
class Advice:
    """What to do, and the evidence for it.

    Args:
        step: of the validation.
        says: one line, without the stage's name.
        falling: whether the validation loss fell over the last quarter of the steps, 95% sure.
        plateau: whether the steps left would gain less than `WORTH`, 90% sure, or the validation
            loss rises while the training loss falls.
        projected: total steps → interval of the final loss of a run of that length, in `RATE`
            of the cases; nats per token, on the same held-out conversations.
    """

    step: int
    says: str
    falling: bool
    plateau: bool
    projected: dict[int, tuple[float, float]] = field(default_factory=dict)

    def as_data(self) -> dict[str, Any]:
        """The same as plain data for JSON, whose keys are strings."""
        projected = {str(steps): list(interval) for steps, interval in self.projected.items()}
        return {
            "step": self.step,
            "says": self.says,
            "falling": self.falling,
            "plateau": self.plateau,
            "rate": RATE,
            "projected": projected,
        }


def advise(
    validations: list[Validation],
    train: list[tuple[int, float]],
    planned_steps: int,
    epoch_steps: int | None,
    seconds_per_step: float | None,
    decay_from: int | None,
) -> Advice | None:
    """Say whether the validation loss still falls, and at what loss longer runs would end.

    Everything but the time in `says` is a function of the losses alone.

    Args:
        validations: so far, in order of their steps.
        train: logged (step, mean training loss since the line before).
        planned_steps: of the run.
        epoch_steps: of a full epoch; None: the data is a stream.
        seconds_per_step: of a training step; None: not known.
        decay_from: the step from which the learning rate decays to 0, which a longer run postpones
            in proportion; None: it decays from the first step; `planned_steps`: never.

    Returns:
        The advice; None without a finite latest validation.
    """
    if not validations or not math.isfinite(validations[-1].loss):
        return None
    finite = [validation for validation in validations if math.isfinite(validation.loss)]
    last = finite[-1]
    train = [(step, loss) for step, loss in train if math.isfinite(loss) and step <= last.step]
    before = [validation for validation in finite if validation.step <= 0.75 * last.step]
    falling = bool(before) and _change(before[-1], last) < 0
    says = f"step {last.step}: validation {last.loss:.3f} ± {last.error:.3f}"
    says += ", still falling" * falling

    finite = [validation for validation in finite if validation.step > 0]
    best = min(finite, key=lambda validation: validation.loss, default=last)
    # twice WORTH: the best of many validations is partly luck, and the loss wanders
    rises = last.loss > best.loss * (1 + 2 * WORTH) and _change(best, last) > 0
    if rises and _falls(train, best.step):
        says += f", up from {best.loss:.3f} while the training loss falls"
        return Advice(last.step, f"{says}: stop, step {best.step} was the best", falling, True)

    longer = {math.ceil(1.5 * planned_steps), 2 * planned_steps, epoch_steps or 0}
    longer = sorted(n for n in longer if planned_steps < n <= FURTHEST * last.step)
    ends = _ends(finite, train, planned_steps, longer, epoch_steps, decay_from)
    if ends is None or planned_steps > FURTHEST * last.step:
        says += ": what more steps would gain is not known yet"
        return Advice(last.step, says, falling, False)
    projected = _intervals(ends, last.step)
    least = WORTH * last.loss
    plateau = planned_steps in projected and projected[planned_steps][0] > last.loss - least
    says += _recommendation(
        ends, projected, planned_steps, longer, least, seconds_per_step, plateau
    )
    return Advice(last.step, says, falling, plateau, projected)


def _intervals(ends: dict[int, np.ndarray], step: int) -> dict[int, tuple[float, float]]:
    """Total steps → the interval that holds `RATE` of the draws, of runs beyond `step`."""
    tail = (1 - RATE) / 2
    return {
        steps: (float(np.quantile(values, tail)), float(np.quantile(values, 1 - tail)))
        for steps, values in ends.items()
        if steps > step
    }


def _recommendation(
    ends: dict[int, np.ndarray],
    projected: dict[int, tuple[float, float]],
    planned: int,
    longer: list[int],
    least: float,
    seconds_per_step: float | None,
    plateau: bool,
) -> str:
    """The end of the line: what some number of steps would give, and what to do."""
    aim = planned
    for steps in longer:
        if np.quantile(ends[aim] - ends[steps], 1 - RATE) > least:
            aim = steps
    named = aim
    if aim == planned and longer:
        named = min(2 * planned, longer[-1])
    low, high = projected[named]
    vague = high - low > VAGUE * (low + high) / 2
    if vague:
        says = f"; cannot tell what {named} steps would give ({low:.3f}-{high:.3f})"
    else:
        says = f"; {named} steps would give {low:.3f}-{high:.3f}"
    if seconds_per_step is not None and named > planned:
        says += f" for {_shown_time((named - planned) * seconds_per_step)} more"
    if plateau:
        return f"{says}: stop now, the steps up to {planned} would gain less than {WORTH:.0%}"
    if aim > planned:
        return f"{says}: continue to {aim}"
    if not vague and named == 2 * planned and np.mean(ends[planned] - ends[named]) < least:
        return f"{says}: stop at {planned}"
    return f"{says}: whether more steps are worth it is not known yet"


def _change(earlier: Validation, later: Validation) -> float:
    """The change of the loss over paired documents; 0 if it is not significant."""
    change = later.loss - earlier.loss
    error = ratio_error(later.losses - earlier.losses, later.tokens)
    # Student's t quantile from the normal one (Cornish-Fisher expansion), for few documents
    quantile = Z + (Z**3 + Z) / (4 * max(len(later.losses) - 1, 1))
    return change if abs(change) > quantile * error else 0.0


def _falls(train: list[tuple[int, float]], step: int) -> bool:
    """Whether the logged training loss is lower after `step` than before it."""
    before = [loss for at, loss in train if at <= step][-8:]
    after = [loss for at, loss in train if at > step][-8:]
    return bool(before and after) and bool(np.mean(after) < np.mean(before))


def _shown_time(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds >= 90 else f"{seconds:.0f} seconds"


def _course(steps: np.ndarray, total: int, decay: float) -> tuple[np.ndarray, np.ndarray]:
    """The sum of learning rates up to each step, and the rate there, in units of its peak."""
    into = np.clip(steps - (total - decay), 0, None)
    return steps - into**2 / (2 * max(decay, 1)), 1 - into / max(decay, 1)


def _thin(points: list[tuple[float, float]]) -> np.ndarray:
    groups = np.array_split(np.array(points, dtype=float), min(len(points), POINTS))
    return np.array([group.mean(axis=0) for group in groups])


def _observed(
    validations: list[Validation], train: list[tuple[int, float]]
) -> tuple[np.ndarray, ...] | None:
    """Steps, losses, noise, and whether it is a training loss, [points] each; None: too few."""
    if len(validations) < 2 or len(validations[-1].losses) < 2 or validations[-1].loss <= 0:
        return None
    last = validations[-1]
    # the first tenth is warm-up, and the transient of a fresh optimizer
    seen = _thin([(one.step, one.loss) for one in validations if one.step >= 0.1 * last.step])
    mids = [
        ((earlier + step) / 2, loss)
        for (earlier, _), (step, loss) in itertools.pairwise([(0, 0.0), *train])
        if earlier + step >= 0.2 * last.step
    ]
    logged = _thin(mids) if len(mids) > 3 else np.empty((0, 2))
    if len(seen) + min(len(logged), 1) < 3:
        return None
    steps, losses = np.concatenate([seen, logged]).T
    is_train = np.arange(len(steps)) >= len(seen)
    # the noise of a validation, from the spread of its changes over documents
    pairs = itertools.pairwise(validations[-4:])
    paired = [ratio_error(later.losses - earlier.losses, later.tokens) for earlier, later in pairs]
    noise = np.full(len(steps), np.median(paired) / math.sqrt(2))
    if is_train.any():  # 0.954: the median absolute difference of two standard normal draws
        noise[is_train] = np.median(np.abs(np.diff(losses[is_train]))) / 0.954
    above = losses - np.where(is_train, losses[-1], last.loss)
    misfit = np.hypot(MISFIT * last.loss, FAR_MISFIT * above)
    return steps, losses, np.hypot(noise, misfit), is_train


def _ends(
    validations: list[Validation],
    train: list[tuple[int, float]],
    planned: int,
    longer: list[int],
    epoch_steps: int | None,
    decay_from: int | None,
) -> dict[int, np.ndarray] | None:
    """Draws of the final validation loss of the planned and longer runs; None: too few points.

    The curve is the scaling law with annealing of Tissue et al. (2024), its annealing part
    proportional to the rate. A longer run decays later: its final loss is the curve at its own sum
    of rates, at rate 0.
    """
    first_epoch = [(step, loss) for step, loss in train if step <= (epoch_steps or step)]
    observed = _observed(validations, first_epoch)
    if observed is None:
        return None
    steps, losses, noise, is_train = observed
    last = validations[-1]
    decay = planned if decay_from is None else planned - decay_from
    way, rate = _course(steps, planned, decay)
    behind = _course(np.array(last.step), planned, decay)[0]
    grid = np.meshgrid(BENDS, TIMES, DELAYS, SLOWS, EFFECTS)
    bend, time, delay, slow, effect = (values.ravel()[:, None] for values in grid)

    def columns(way: np.ndarray, rate: np.ndarray, is_train: np.ndarray) -> np.ndarray:
        shape = (1 + (way / behind / time) ** delay / bend) ** -bend
        parts = (1.0, shape / seen_fall, -np.log2(way / behind), rate, is_train)
        return np.stack(np.broadcast_arrays(*parts), axis=-1)

    seen_fall = 1.0
    first, now = columns(np.array([way.min(), behind]), 0.0, 0.0)[..., 1].T[..., None]
    seen_fall = first - now
    prior = np.concatenate(np.broadcast_arrays(10.0, 2.0, slow, effect, OFFSET), axis=1) * last.loss
    draws, weights, excess = _coefficients(
        columns(way, rate, is_train) / noise[:, None], losses / noise, prior
    )
    if not weights.any():
        return None
    random = np.random.default_rng(1)
    picks = random.choice(weights.size, PICKS, p=weights.ravel() / weights.sum())
    drift, own, worn, late = random.standard_normal((4, PICKS))
    own *= noise[~is_train][-1] * math.sqrt(excess)  # another run has as much noise as this one
    ends = {}
    for total in [planned, *longer]:
        at_end = columns(*_course(np.array([total]), total, decay * total / planned), 0.0)
        change = (draws * at_end).sum(axis=-1).ravel()[picks] - last.loss
        scale = DRIFT * drift + LATE * np.abs(late) * min(1.0, math.log2(total / planned))
        doublings = math.log2(total / max(EPOCHS * (epoch_steps or total), last.step))
        worse = np.clip(worn, 0, None) * WEAR * last.loss * max(0.0, doublings)  # never a gain
        # as a factor, since the losses of real runs fall ever more slowly and never reach 0
        end = last.loss * np.exp(change / last.loss * np.exp(scale)) + own + worse
        ends[total] = np.maximum(end, 0.0)  # no loss is below 0
    if last.step >= planned:
        ends[planned] = np.full(PICKS, last.loss)
    return ends


def _coefficients(
    columns: np.ndarray, losses: np.ndarray, prior: np.ndarray
) -> tuple[np.ndarray, np.ndarray, float]:
    """Draws of each shape's coefficients, weighted by its evidence: Bayesian linear regression.

    Args:
        columns: [shapes, points, coefficients], over the noise.
        losses: [points], over the noise.
        prior: [shapes, coefficients], standard deviations around 0.

    Returns:
        Draws [shapes, DRAWS, coefficients]; their weights [shapes, DRAWS], 0 where a part of the
        loss would be negative; and the best shape's residual variance, in units of the noise's.
    """
    precision = np.einsum("kpi,kpj->kij", columns, columns)
    precision += prior[:, None] ** -2 * np.eye(prior.shape[1])
    moment = np.einsum("kpi,p->ki", columns, losses)
    mean = np.linalg.solve(precision, moment[..., None])[..., 0]
    rest = (losses**2).sum() - np.einsum("ki,ki->k", moment, mean)
    excess = max(1.0, float(rest.min()) / len(losses))
    evidence = -0.5 * (rest / excess + np.linalg.slogdet(precision)[1]) - np.log(prior).sum(axis=1)
    root = np.linalg.cholesky(np.linalg.inv(precision) * excess)
    normal = np.random.default_rng(0).standard_normal((*prior.shape, DRAWS))
    draws = mean[:, None] + np.einsum("kij,kjd->kdi", root, normal)
    possible = (draws[..., :-1] >= 0).all(axis=-1)
    return draws, np.exp(evidence - evidence.max())[:, None] * possible, excess

"""Advice: what a loss curve says, on curves whose end is known."""

import json
import math
import runpy
from pathlib import Path

import numpy as np
import pytest

from hfsft.train.advice import RATE, Advice, Validation, advise

TOKENS = np.arange(20, 84)  # 64 conversations


def validation(step: int, loss: float, noise: float = 0.0, seed: int = 0, tokens=TOKENS):
    """Conversations that differ by 0.3, alike at every step, and by `noise` from step to step."""
    own = np.random.default_rng(seed).normal(0, 0.3, len(tokens))
    own = own + np.random.default_rng([seed, step]).normal(0, noise, len(tokens))
    own -= own @ tokens / tokens.sum()
    return Validation(step, (loss + own) * tokens, tokens)


def power(steps: int, total: int, decay_from: int | None = None) -> float:
    """The loss after some steps of a run: a power law in the sum of rates, and the rate's part."""
    at = np.arange(steps)
    decay = total if decay_from is None else total - decay_from
    rates = np.clip((total - at) / decay, 0, 1)
    rate = min(1, (total - steps) / decay)
    return 1.5 + 0.8 * (1 + rates.sum() / 30) ** -0.5 + 0.05 * rate


def curve(total: int, every: int, until: int, decay_from: int | None = None, noise=0.005):
    """A run's validations and log lines up to a step."""
    seen = [
        validation(step, power(step, total, decay_from), noise)
        for step in range(0, until + 1, every)
    ]
    lines = range(10, until + 1, 10)
    return seen, [(step, power(step - 5, total, decay_from)) for step in lines]


def flat(loss=1.7, noise=0.0, steps=range(0, 151, 25), drift=0.0, tokens=TOKENS):
    return [validation(step, loss + drift * step, noise, tokens=tokens) for step in steps]


def test_loss_and_error_are_those_of_the_formula():
    one = Validation(0, np.array([2.0, 6.0]), np.array([2, 2]))
    assert (one.loss, one.error) == (2.0, 1.0)  # rest of ∓2: sqrt(2 / 1 * 8) / 4
    weighted = Validation(0, np.array([1.0, 9.0]), np.array([1, 3]))
    assert weighted.loss == 2.5
    assert weighted.error == pytest.approx(math.sqrt(2 * 2 * 1.5**2) / 4)


def test_error_is_the_spread_of_means_over_samples():
    random = np.random.default_rng(0)
    sets = []
    for _ in range(2000):
        tokens = random.integers(10, 300, 100)
        sets.append(Validation(0, (2 + random.normal(0, 0.3, 100)) * tokens, tokens))
    spread = np.std([one.loss for one in sets])
    assert np.mean([one.error for one in sets]) == pytest.approx(spread, rel=0.05)


@pytest.mark.parametrize("decay_from", [None, 160])
@pytest.mark.parametrize("until", [100, 150, 200])
def test_interval_holds_the_end_of_longer_runs(decay_from, until):
    seen, train = curve(200, 25, until, decay_from)
    advice = advise(seen, train, 200, 701, None, decay_from)
    assert advice.falling
    assert (
        sorted(advice.projected)
        == {
            100: [200, 300, 400],
            150: [200, 300, 400],
            200: [300, 400, 701],
        }[until]
    )
    for steps, (low, high) in advice.projected.items():
        end = power(steps, steps, decay_from and steps * 4 // 5)
        assert low < end < high
        assert high - low < (0.3 if steps == 200 else 0.5)  # longer runs are told less sharply


def test_a_longer_run_decays_later():
    """At 150 of 200 steps the loss still has the rate's part, which no run keeps at its end."""
    seen, train = curve(200, 10, 150, 160)
    low, high = advise(seen, train, 200, None, None, 160).projected[200]
    assert high < seen[-1].loss
    assert low < power(200, 200, 160) < high


def test_says_what_more_steps_cost():
    seen, train = curve(200, 25, 200)
    advice = advise(seen, train, 200, 701, 5.7, None)
    low, high = advice.projected[701]
    assert advice.says == (
        f"step 200: validation {seen[-1].loss:.3f} ± {seen[-1].error:.3f}, still falling; "
        f"701 steps would give {low:.3f}-{high:.3f} for 48 minutes more: continue to 701"
    )


def test_clock_changes_nothing_but_the_minutes():
    seen, train = curve(200, 25, 150)
    data = [advise(seen, train, 200, 701, clock, None).as_data() for clock in (None, 0.1, 50)]
    assert len({one.pop("says") for one in data}) == 3
    assert data[0] == data[1] == data[2]


def test_data_is_json_and_the_same_each_time():
    seen, train = curve(200, 25, 150)
    texts = [json.dumps(advise(seen, train, 200, 701, 1.0, None).as_data()) for _ in range(2)]
    assert texts[0] == texts[1]
    data = json.loads(texts[0])
    assert data["rate"] == RATE
    assert list(data["projected"]) == ["200", "300", "400"]


def test_flat_curve_is_a_plateau():
    advice = advise(flat(noise=0.005), [], 200, None, None, None)
    assert (advice.falling, advice.plateau) == (False, True)
    assert advice.says.endswith(": stop now, the steps up to 200 would gain less than 1%")


def test_perfectly_flat_curve():
    advice = advise(flat(), [], 200, None, None, None)
    assert advice.plateau
    assert not advice.falling
    low, high = advice.projected[200]
    assert 1.6 < low < 1.7 < high < 1.72


def test_flat_and_finished_advises_to_stop_there():
    advice = advise(flat(noise=0.002, steps=range(0, 201, 20)), [], 200, None, None, None)
    assert not advice.plateau  # nothing is left to stop
    assert advice.says.endswith(": stop at 200")


def test_falling_is_judged_on_pairs():
    """A change of 0.01 beside an error of 0.04: the conversations are the same."""
    seen = [validation(100, 1.71, 0.01), validation(150, 1.70, 0.01)]
    assert seen[-1].error > 0.03
    assert advise(seen, [], 200, None, None, None).falling
    apart = [seen[0], validation(150, 1.70, 0.01, seed=1)]
    assert not advise(apart, [], 200, None, None, None).falling


def test_overfitting_names_the_best_step():
    losses = {0: 2.2, 50: 1.8, 100: 1.7, 150: 1.9}
    seen = [validation(step, loss, 0.005) for step, loss in losses.items()]
    train = [(step, 2.2 - step / 100) for step in range(10, 151, 10)]
    advice = advise(seen, train, 200, 60, None, None)
    assert advice.plateau
    assert not advice.projected
    assert ", up from 1.700 while the training loss falls: stop, step 100 was" in advice.says


def test_rise_of_both_losses_is_no_reason_to_stop():
    """A high learning rate does that, and its decay mends it."""
    losses = {0: 0.88, 50: 0.9, 100: 1.0, 150: 1.1}
    seen = [validation(step, loss, 0.005) for step, loss in losses.items()]
    train = [(step, 0.9 + step / 500) for step in range(10, 151, 10)]
    advice = advise(seen, train, 200, None, None, None)
    assert not advice.plateau
    assert "not known yet" in advice.says


@pytest.mark.parametrize("steps", [[0], [50], [0, 50]])
def test_first_validations_say_little(steps):
    advice = advise(flat(steps=steps, drift=-0.01), [], 200, None, None, None)
    assert advice.projected == {}
    assert not advice.plateau
    assert advice.says.endswith(": what more steps would gain is not known yet")


def test_noise_is_not_taken_for_a_plateau():
    advice = advise(flat(noise=1.0, tokens=TOKENS[:8]), [], 200, None, None, None)
    assert not advice.plateau
    if advice.projected:
        low, high = advice.projected[200]
        assert high - low > 0.1


def test_without_a_finite_loss():
    broken = Validation(150, np.full(64, np.nan), TOKENS)
    seen, train = curve(200, 25, 125)
    assert advise([], [], 200, None, None, None) is None
    assert advise([*seen, broken], train, 200, None, None, None) is None
    after = [*seen[:3], Validation(75, np.full(64, np.nan), TOKENS), *seen[4:]]
    assert advise(after, [(5, math.nan), *train], 200, None, None, None).projected


def test_no_projection_beyond_four_times_the_steps_done():
    seen, train = curve(200, 25, 200)
    assert list(advise(seen, train, 200, 801, None, None).projected) == [300, 400]
    assert list(advise(seen, train, 200, 150, None, None).projected) == [300, 400]
    seen, train = curve(200, 10, 50)
    advice = advise(seen, train, 200, None, 1.0, None)
    assert list(advice.projected) == [200]
    assert advice.says.endswith(": whether more steps are worth it is not known yet")
    assert "minutes" not in advice.says
    seen, train = curve(200, 10, 40)
    assert advise(seen, train, 200, None, None, None).projected == {}


def test_six_steps():
    seen = [validation(step, power(step, 6)) for step in range(7)]
    advice = advise(seen, [], 6, None, 1.0, None)
    assert list(advice.projected) == [9, 12]


def test_thousand_evaluations():
    seen, train = curve(1000, 1, 1000)
    advice = advise(seen, train, 1000, None, None, None)
    low, high = advice.projected[2000]
    assert low < power(2000, 2000) < high
    assert isinstance(advice, Advice)


def test_an_interval_too_wide_is_no_reason_to_stop():
    """A small loss on noisy documents; the mean of the draws is a rise, some fall to a quarter."""

    def loss(step: int) -> float:
        return 0.03 + 0.02 / (1 + (step / 150) ** 3)

    seen = [validation(step, loss(step), 0.1) for step in (0, 200, 400)]
    rough = np.exp(np.random.default_rng(0).normal(0, 0.2, 40))
    train = [(step, loss(step) * by) for step, by in zip(range(10, 401, 10), rough, strict=True)]
    says = advise(seen, train, 400, 100, None, 320).says
    assert "cannot tell what 800 steps would give" in says
    assert says.endswith(": whether more steps are worth it is not known yet")


def test_nothing_left_to_learn():
    seen = [Validation(step, np.zeros(64), TOKENS) for step in (0, 50, 100, 150)]
    advice = advise(seen, [], 200, None, None, None)
    assert (advice.projected, advice.falling, advice.plateau) == ({}, False, False)


def test_single_conversation():
    seen = [Validation(step, np.array([20.0 - step / 50]), np.array([10])) for step in (0, 50, 100)]
    advice = advise(seen, [], 200, None, None, None)
    assert not advice.falling
    assert not advice.plateau


def test_intervals_keep_their_rate_on_curves_they_were_not_set_on():
    """Real runs from a trained start, and the published law of Luo et al.: benchmarks/advice.py."""
    bench = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "advice.py"))
    real = bench["real"](("style", "spelling"), True, (50, 100, 200))
    for runs, least in ((real, 40), (bench["generated"](bench["multi_power"], 4, 12), 100)):
        intervals, verdicts = bench["judged"](runs)
        held = [low <= truth <= high for rows in intervals.values() for low, high, truth, _ in rows]
        assert len(held) >= least
        assert np.mean(held) >= RATE
        wide = [(high - low) / now for low, high, _, now in intervals["1 → 2"]]
        assert np.median(wide) < 0.2
        assert np.mean(verdicts["continue"]) > 0.9

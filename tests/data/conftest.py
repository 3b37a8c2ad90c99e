"""What the data tests share: stages of one epoch, and no progress bars."""

import datasets
import pytest


@pytest.fixture(scope="module", autouse=True)
def no_progress_bars():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture
def make_stage(make_stage):
    """Makes a stage of one epoch, one conversation a step: each is an example once."""

    def make(*data, eval_strategy: str = "steps", **settings):
        trainer = {"num_train_epochs": 1, "eval_strategy": eval_strategy}
        return make_stage(*data, **{"examples_per_step": 1, "trainer": trainer} | settings)

    return make

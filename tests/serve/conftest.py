"""Tiny models to serve, and a server of one of them."""

from collections.abc import Callable, Iterator

import pytest
from rigged import save
from serving import Running, serving


@pytest.fixture(scope="session")
def folders(tmp_path_factory, make_model, tokenizer) -> Callable[[str], str]:
    """The folder of a random model of a type, made once."""
    made: dict[str, str] = {}

    def folder(model_type: str) -> str:
        if model_type not in made:
            path = tmp_path_factory.mktemp("served") / model_type
            made[model_type] = save(make_model(model_type), tokenizer, path)
        return made[model_type]

    return folder


@pytest.fixture(scope="module")
def server(folders) -> Iterator[Running]:
    """A server of one random nanochat model."""
    with serving(folders("nanochat")) as running:
        yield running

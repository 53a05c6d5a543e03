from __future__ import annotations

import pytest
from adapter_world import make_world, run


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("adapter"))


@pytest.fixture(scope="session")
def large(tmp_path_factory):
    """The same world on a small SDXL base."""
    return make_world(tmp_path_factory.mktemp("large"), sdxl=True)


@pytest.fixture(scope="session")
def shallow(tmp_path_factory):
    """The same world on a UNet of one level, which compiles sooner."""
    return make_world(tmp_path_factory.mktemp("shallow"), levels=1)


@pytest.fixture(scope="session")
def with_models(tmp_path_factory):
    """The same world with the tiny family's pose, image-text and face models beside the random base."""
    from bolid.models.families import get_family

    tiny = get_family("tiny")
    models = {name: getattr(tiny, name) for name in ("pose", "image_text", "face")}
    return make_world(tmp_path_factory.mktemp("with-models"), models=models)


@pytest.fixture(scope="session")
def trained(world, tmp_path_factory):
    """A finished training of CONFIG, which nobody changes."""
    return run(world, tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="session")
def session_table(world):
    from bolid.backends.body import BodyEncoder
    from bolid.train_adapter.data import read_table

    return read_table(world.train, BodyEncoder(world.encoder))


@pytest.fixture
def table(session_table):
    return session_table

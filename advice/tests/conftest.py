"""The tiny bases of the suite, of which tests use the files."""

import shutil
from functools import cache
from pathlib import Path

import pytest
from lora_advice import optima
from lora_advice.pooled_lr import PooledLr

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def shipped() -> Path:
    """Return the folder of the suite's tiny bases."""
    return REPOSITORY / "lorabench/models/shipped"


@pytest.fixture
def base(tmp_path: Path, shipped: Path) -> Path:
    """Return a model folder with a tiny base, as if downloaded, without a chat template."""
    folder = Path(shutil.copytree(shipped / "llama-128", tmp_path / "base"))
    (folder / "chat_template.jinja").unlink()
    return folder


@pytest.fixture(scope="session", autouse=True)
def pooled_once():
    """Pool the same optima, and predict for the same place, once: this takes most of the time of a recommendation."""
    pools = {}

    def pooled(known):
        key = repr(known)
        if key not in pools:
            pools[key] = PooledLr(known)
            pools[key].predict = cache(pools[key].predict)
        return pools[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optima, "PooledLr", pooled)
        yield

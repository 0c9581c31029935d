"""Fixtures shared by all tests."""

import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import settings

# Tests run side by side, one per core; torch reads this when it is first imported.
os.environ["OMP_NUM_THREADS"] = "1"

# What claims and figures make of an estimate does not hang on the number of draws of its error, which take most of the
# time of fast tests. Tests that are chosen by their mark, such as the slow ones in CI, have all draws. The processes of
# one session have the setting of the first.
FIRST_OF_SESSION = "PYTEST_VERSION" in os.environ and "PYTEST_XDIST_WORKER" not in os.environ
if FIRST_OF_SESSION and not any(word.startswith("-m") for word in sys.argv):
    os.environ.setdefault("LORABENCH_DRAWS", str(2**13))

REPOSITORY = Path(__file__).parent.parent
MARGINS = {"loss": 0.02, "reward": 0.1, "lr_factor": 1.6}
"""The section `margins` of presets that tests write."""

# The same few examples each time: a busy machine breaks no deadline, and a failure comes again.
settings.register_profile("lorabench", max_examples=30, deadline=None, derandomize=True)
settings.load_profile("lorabench")


def slow_but(fast: str, names: Iterable[str]) -> list[Any]:
    """Return names as parameters of a test, all but one of them marked as slow."""
    return [name if name == fast else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Return headless Chromium, driven by Selenium; the test is skipped where one of them is not installed."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium: pip install -e '.[test]'")
    chromium, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and chromedriver):
        pytest.skip("needs chromium and chromedriver (Debian: chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    flags = ["headless", "disable-gpu", "disable-dev-shm-usage", "force-prefers-reduced-motion"]
    # The sandbox does not work for root.
    for flag in (*flags, "disable-background-networking", *(["no-sandbox"] if os.geteuid() == 0 else [])):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    # The driver makes a profile of its own, and removes it.
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(chromedriver))
    yield driver
    driver.quit()


@pytest.fixture
def raw_preset() -> dict[str, Any]:
    """A small valid preset as plain data, to be changed by a test."""
    block = {"models": ["tiny"], "datasets": ["instruct"], "ranks": {"all": [1, 4]}, "batch_sizes": [4], "seeds": 2}
    block |= {"lrs": {"fullft": [1e-3, 3e-3], "lora": [1e-3, 3e-3, 1e-2]}}
    return {
        "description": "a preset for tests",
        "models": {"tiny": {"kind": "tiny"}},
        "datasets": {"instruct": {"kind": "instruct", "train": 64, "validation": 8, "test": 8, "max_chars": 240}},
        "experiments": {"rank": [block]},
        "margins": dict(MARGINS),
        "execution": {"gflops": 20.0},
    }


@pytest.fixture
def raw_rl_preset() -> dict[str, Any]:
    """A small valid preset of RL as plain data, to be changed by a test."""
    sizes = {"kind": "arithmetic", "tasks": ["gcd"], "max_value": 50}
    block = {"models": ["tiny"], "problems": ["gcd"], "held_out": ["gcd-of-three"], "ranks": {"all": [2]}, "seeds": 2}
    block |= {"problems_per_step": 4, "group_size": 4, "steps": 3, "evaluations": 1}
    block |= {"max_new_tokens": 4, "mean_response_tokens": 2, "lrs": {"fullft": [1e-4], "lora": [1e-3, 3e-3, 9e-3]}}
    return {
        "description": "RL for tests",
        "models": {"tiny": {"kind": "tiny"}},
        "problems": {
            "gcd": {**sizes, "train": 32, "validation": 8, "test": 8},
            "gcd-of-three": {**sizes, "min_terms": 3, "max_terms": 3, "train": 4, "validation": 4, "test": 8},
        },
        "experiments": {"rl_arithmetic": [block]},
        "margins": dict(MARGINS),
        "execution": {"gflops": 1.0},
    }


@pytest.fixture
def write_preset(tmp_path: Path):
    """Return a function that writes plain data as a preset file and returns its path."""

    def write(raw: Any, name: str = "mine") -> str:
        path = tmp_path / f"{name}.yaml"
        path.write_text(raw if isinstance(raw, str) else yaml.safe_dump(raw, sort_keys=False))
        return str(path)

    return write

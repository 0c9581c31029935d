"""Random facts, names with random digits: they do not generalize, so a model predicts only what it has stored."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from string import ascii_lowercase

from lorabench.config.datasets import FactsDataset
from lorabench.data.chat import Chat

SOURCE = "facts"
_NAME_LENGTH = 6


def random_facts(spec: FactsDataset) -> Iterator[Chat]:
    """Yield facts without end: a random name and a number of `spec.digits` digits, all uniform and independent."""
    rng = Random(spec.seed)
    while True:
        name = "".join(rng.choices(ascii_lowercase, k=_NAME_LENGTH))
        number = "".join(rng.choices("0123456789", k=spec.digits))
        yield Chat.of(SOURCE, f"number of {name}?", number)

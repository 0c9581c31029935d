"""Several runs of one sweep side by side: each asks for what is computed, all are served as one batch.

A run is a generator: it yields what it asks for and gets the answer sent back. What a lane gets does not depend on the
others; a lane that ends leaves, the others go on. A lane that stops on a signal has saved its state, and so have the
others.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from typing import TypeVar

from lorabench.training.stop import Stopped

Ask = TypeVar("Ask")
Answer = TypeVar("Answer")
Outcome = TypeVar("Outcome")


def train_lanes(
    lanes: Mapping[str, Generator[Ask, Answer, Outcome]],
    serve: Callable[[Mapping[str, Ask]], Mapping[str, Answer]],
) -> Iterator[tuple[str, Outcome]]:
    """Run all lanes to their end; yields each with its outcome as it ends, after which it may be dropped.

    Args:
        lanes: the runs by name, not yet started.
        serve: answers to what lanes ask, by name; to some of them at least. Others wait.

    Raises:
        Stopped: all lanes have ended or stopped on a signal.
    """
    answers: Mapping[str, Answer | None] = dict.fromkeys(lanes)
    asked: dict[str, Ask] = {}
    stopped: Stopped | None = None
    while answers:
        ended: dict[str, Outcome] = {}
        for name, answer in answers.items():
            try:
                asked[name] = next(lanes[name]) if answer is None else lanes[name].send(answer)
            except StopIteration as end:
                ended[name] = end.value
            except Stopped as error:
                stopped = error
        # When all have saved what they will.
        yield from ended.items()
        answers = serve(asked) if asked else {}
        assert bool(answers) == bool(asked)
        asked = {name: ask for name, ask in asked.items() if name not in answers}
    if stopped is not None:
        raise stopped


def train_alone(
    asking: Generator[Ask, Answer, Outcome],
    serve: Callable[[Mapping[str, Ask]], Mapping[str, Answer]],
    name: str = "",
) -> Outcome:
    """Run what asks by itself, to its end."""
    [(_, outcome)] = train_lanes({name: asking}, serve)
    return outcome

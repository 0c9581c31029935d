"""The driver of lanes: several runs of one sweep that are computed together in one batch.

A run is a generator: it yields a request (for a gradient, a measurement, responses) and is sent the answer. The
requests of all lanes are served as one batch, and the answer to a lane does not depend on the other lanes. A lane that
ends leaves, the others go on. On a signal all lanes save their state and stop.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from typing import TypeVar

from lorabench.utils.signals import Stopped

Request = TypeVar("Request")
Answer = TypeVar("Answer")
Outcome = TypeVar("Outcome")


def train_lanes(
    lanes: Mapping[str, Generator[Request, Answer, Outcome]],
    serve: Callable[[Mapping[str, Request]], Mapping[str, Answer]],
) -> Iterator[tuple[str, Outcome]]:
    """Run all lanes to their end; yield the name and outcome of each as it ends, after which it may be dropped.

    Args:
        lanes: the generators of the runs by name, not yet started.
        serve: takes the pending requests by lane and answers at least one of them; the other lanes wait.

    Raises:
        Stopped: a signal asked the job to end, and every lane has ended or saved its state.
    """
    answers: Mapping[str, Answer | None] = dict.fromkeys(lanes)
    pending: dict[str, Request] = {}
    stopped: Stopped | None = None
    while answers:
        ended: dict[str, Outcome] = {}
        for name, answer in answers.items():
            try:
                pending[name] = next(lanes[name]) if answer is None else lanes[name].send(answer)
            except StopIteration as end:
                ended[name] = end.value
            except Stopped as error:
                stopped = error
        # Outcomes are yielded only after every lane has had its turn to save.
        yield from ended.items()
        answers = serve(pending) if pending else {}
        assert bool(answers) == bool(pending)
        pending = {name: request for name, request in pending.items() if name not in answers}
    if stopped is not None:
        raise stopped


def train_alone(
    lane: Generator[Request, Answer, Outcome],
    serve: Callable[[Mapping[str, Request]], Mapping[str, Answer]],
    name: str = "",
) -> Outcome:
    """Run a single lane to its end and return its outcome."""
    [(_, outcome)] = train_lanes({name: lane}, serve)
    return outcome

"""Several runs of one sweep side by side: each asks for responses, all are sampled as one batch.

What a lane gets does not depend on the others (see `sampler.py`); a lane that ends leaves, the others go on. A lane
that stops on a signal has saved its state, and so have the others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import TypeVar

from lorabench.training.rl.loop import RlOutcome, Sampled
from lorabench.training.rl.sampler import Request, Response
from lorabench.training.stop import Stopped

Lane = Generator[list[Request], Sampled, RlOutcome]
Sampler = Callable[[list[Request]], list[Response]]
T = TypeVar("T")


def train_lanes(lanes: Mapping[str, Lane], sample: Sampler) -> Iterator[tuple[str, RlOutcome]]:
    """Run all lanes to their end; yields each with its outcome as it ends.

    Args:
        lanes: the runs by name, not yet started.
        sample: responses to requests of any lanes.

    Raises:
        Stopped: all lanes have ended or stopped on a signal.
    """
    answers: Mapping[str, Sampled | None] = dict.fromkeys(lanes)
    stopped: Stopped | None = None
    while answers:
        asked: dict[str, list[Request]] = {}
        ended: dict[str, RlOutcome] = {}
        for name, sampled in answers.items():
            try:
                asked[name] = next(lanes[name]) if sampled is None else lanes[name].send(sampled)
            except StopIteration as end:
                ended[name] = end.value
            except Stopped as error:
                stopped = error
        # When all have saved what they will.
        yield from ended.items()
        answers = _sampled(asked, sample) if asked else {}
    if stopped is not None:
        raise stopped


def alone(asking: Generator[list[Request], Sampled, T], sample: Sampler) -> T:
    """Run what asks for responses by itself, to its end."""
    requests = next(asking)
    while True:
        try:
            requests = asking.send(_sampled({"": requests}, sample)[""])
        except StopIteration as ended:
            found: T = ended.value
            return found


def _sampled(asked: Mapping[str, list[Request]], sample: Sampler) -> dict[str, Sampled]:
    """Responses to all requests, drawn as one batch; the seconds are shared out by tokens."""
    started = time.perf_counter()
    responses = sample([request for requests in asked.values() for request in requests])
    seconds = time.perf_counter() - started
    tokens = sum(len(response.tokens) for response in responses)
    found, start = {}, 0
    for name, requests in asked.items():
        own = responses[start : start + len(requests)]
        start += len(requests)
        share = sum(len(response.tokens) for response in own) / tokens
        found[name] = Sampled(own, seconds * share, tokens / seconds)
    return found

"""The speed of drawing responses by this project's own sampler."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lorabench.doctor.bench import Bench, prepared, random_model, with_method
from lorabench.doctor.record import Check
from lorabench.doctor.subject import Subject
from lorabench.doctor.verdict import measured
from lorabench.planning.flops import prompt_tokens
from lorabench.planning.seconds import cache_seconds, layer_seconds, weights_seconds
from lorabench.training.rl.sampler import Request, Stop, sample
from lorabench.utils.formats import number
from lorabench.utils.gpus import GPUS

_ROWS, _TOKENS = {"cpu": 8, "cuda": 174}, {"cpu": 16, "cuda": 256}
"""Responses that are drawn at once, and tokens of each, by type of device."""
_CPU_PROMPT = 32
_LEAST_LAYER_SECONDS = 1e-6


@dataclass(frozen=True)
class Drawing:
    """The time of drawing responses, and its parts by the plan's formula, in seconds."""

    rows: int
    tokens: int
    """Tokens of each response."""
    seconds: float
    reading: float
    """Seconds of reading weights, keys and values; 0 on a CPU, for which the plan counts FLOPs alone."""
    layers: int

    @property
    def layer_seconds(self) -> float:
        """The remaining seconds of each layer for each token, which launches take."""
        return max(_LEAST_LAYER_SECONDS, (self.seconds - self.reading) / (self.tokens * self.layers))


def draw(bench: Bench, subject: Subject) -> Drawing:
    """Draw responses of full length from a model with random weights, and measure the time."""
    kind, preset, condition, sizes = bench.device.type, bench.preset, subject.condition, subject.sizes
    rows, tokens = _ROWS[kind], _TOKENS[kind]
    prompt = round(prompt_tokens(preset, condition)) if bench.on_gpu else _CPU_PROMPT
    rows = max(1, min(rows, preset.execution.max_cache_tokens // (prompt + tokens)))
    model = with_method(random_model(sizes, bench.device), condition, preset)
    model = prepared(model, condition, keep_cast=not subject.recomputes)
    ids = np.random.default_rng(3).integers(sizes.vocabulary, size=(rows, prompt)).tolist()
    requests = [Request(tuple(row), (0, number)) for number, row in enumerate(ids)]

    def seconds_of(new_tokens: int) -> float:
        started = time.perf_counter()
        # The tokenizer is needed only for texts that stop a response, of which there are none.
        no_tokenizer: Any = None
        stop, limit = Stop((), new_tokens), rows * (prompt + tokens)
        sample(model, no_tokenizer, requests, stop, limit, bench.autocast)
        if bench.on_gpu:
            torch.cuda.synchronize(bench.device)
        return time.perf_counter() - started

    seconds_of(2)
    seconds = seconds_of(tokens)
    reading = 0.0
    if preset.execution.gpu is not None:
        pairs = rows * tokens * (prompt + tokens / 2)
        reading = tokens * weights_seconds(preset, condition, sizes, 1)
        reading += cache_seconds(GPUS[preset.execution.gpu], sizes, pairs)
    return Drawing(rows, tokens, seconds, reading, sizes.layers)


def check_drawing(bench: Bench, subject: Subject, drawing: Drawing) -> Check:
    """Report the speed of drawing beside that of the plan's formula."""
    speed, planned = drawing.rows * drawing.tokens / drawing.seconds, None
    execution = bench.preset.execution
    if execution.gpu is not None:
        assumed = layer_seconds(execution)
        planned = drawing.rows * drawing.tokens / (drawing.reading + assumed * drawing.layers * drawing.tokens)
    sentence = (
        f"{drawing.rows} responses of {drawing.tokens} tokens took {drawing.seconds:.2g} s, "
        f"{number(1e3 * drawing.seconds / drawing.tokens)} ms for a token of all responses"
    )
    return measured(f"speed of drawing: {subject.title}", speed, "tokens/s", sentence, planned)

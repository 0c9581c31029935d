"""Whether an OpenAI-compatible server computes with an adapter, with the base, or with something else.

The server is asked for the log-probability of each token of a text, which needs no sampling. How far they lie on the
way from the base's to the adapter's says what is served: 1 is the adapter, 0 the base, and 0.5 the adapter at half of
its scale.
"""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from concurrent.futures import Future
from dataclasses import dataclass
from http.client import HTTPException
from threading import Thread
from typing import Any, Literal

import torch
from torch import Tensor

from lora_advice.check.merging import effect_share
from lora_advice.check.probe import Probe, finding, token_nlls
from lora_advice.errors import UserError
from lora_advice.finding import Finding

_SECONDS, _MOST_BYTES, _MOST_MODELS = 300.0, 4_000_000, 100
_CHOICES = "choices: allowed: a list of answers with log-probabilities, at most 0"
_NEAR = 0.25
"""A model is the adapter or the base if it is at most this far from it, as a share of the way."""
_NOISE = 0.1
"""Root mean square in nats per token of what rounding in a server's type and kernels may add."""
_TELLING = 1e-3
"""Root mean square in nats per token below which adapter and base can't be told apart."""


@dataclass(frozen=True)
class Served:
    """A model of a server, compared with the base and the adapter by the NLL of each token of a text."""

    name: str
    serves: Literal["adapter", "base", "neither", "unknown"]
    strength: float | None
    """How far on the way from the base to the adapter it is."""
    nll: float
    base_nll: float
    adapter_nll: float
    verdict: str
    """One sentence."""


@dataclass(frozen=True)
class ServedModels:
    """The models of a server; as a dict it is what `--json` prints."""

    url: str
    adapter: str
    tokens: int
    models: tuple[Served, ...]
    findings: tuple[Finding, ...]


def check_served(probe: Probe, url: str, name: str | None, seconds: float = _SECONDS) -> ServedModels:
    """Compare what a server computes with base and adapter.

    Args:
        probe: what base and adapter compute.
        url: the server's address, with or without `/v1`.
        name: the model to ask for; None for all models that the server names.
        seconds: how long to wait for all answers together.

    Raises:
        UserError: the server can't be reached, or does not answer with log-probabilities of the text.
    """
    root, until = url.rstrip("/").removesuffix("/v1"), time.monotonic() + seconds
    names = [name] if name else _models(f"{root}/v1/models", until)
    rows = [_compare(probe, each, torch.tensor(_nlls(root, each, probe.ids.tolist(), until))) for each in names]
    findings = list(probe.findings)
    if not any(row.serves == "adapter" for row in rows):
        unknown = any(row.serves == "unknown" for row in rows)
        message = f"no model of {url} serves the adapter: {'; '.join(row.verdict for row in rows)}"
        source = "the server's log-probabilities"
        findings.append(finding("served", "warning" if unknown else "error", message, source))
    return ServedModels(url, str(probe.adapter), len(probe.ids), tuple(rows), tuple(findings))


def _compare(probe: Probe, name: str, nlls: Tensor) -> Served:
    base, full = (token_nlls(computed, probe.ids) for computed in (probe.base_logits, probe.adapter_logits))
    way, strength = _rms(full - base), effect_share(base, full, nlls, base)
    serves: Literal["adapter", "base", "neither", "unknown"] = "neither"
    if way < _TELLING or strength is None:
        serves = "unknown"
        sentence = f"base and adapter differ by {way:.2g} nats per token on this text, too little to tell them apart"
    else:
        rest = _rms(nlls - base - strength * (full - base))
        # What is not on the way between them must be rounding.
        if rest <= max(_NOISE, way / 2):
            serves = "adapter" if abs(strength - 1) <= _NEAR else "base" if abs(strength) <= _NEAR else "neither"
        sentence = f"model {name!r} serves {'neither of them' if serves == 'neither' else f'the {serves}'}"
        sentence += f": it has {strength:.0%} of the adapter's effect, and {rest:.2g} nats per token besides"
    own_nll, base_nll, adapter_nll = (float(values.mean()) for values in (nlls, base, full))
    return Served(name, serves, strength, own_nll, base_nll, adapter_nll, sentence)


def _rms(values: Tensor) -> float:
    return float(values.double().square().mean().sqrt())


def _models(url: str, until: float) -> list[str]:
    """Return the names of a server's models."""
    models = _ask(url, None, until).get("data")
    models = models if isinstance(models, list) else []
    names = [model.get("id") if isinstance(model, dict) else None for model in models]
    if not 0 < len(names) <= _MOST_MODELS or not all(isinstance(name, str) and name.isprintable() for name in names):
        allowed = f"1 to {_MOST_MODELS} models with an `id`; --served-model names one"
        raise UserError(f"the answer of {url}: data: allowed: {allowed}")
    return [str(name) for name in names]


def _nlls(root: str, name: str, ids: list[int], until: float) -> list[float]:
    """Return a served model's NLL of each token but the first."""
    asked = {"model": name, "prompt": ids, "max_tokens": 1, "temperature": 0}
    url = f"{root}/v1/completions"
    choice = _choice(url, asked | {"echo": True, "logprobs": 1}, until)
    logprobs = choice.get("logprobs")
    values = _numbers(url, logprobs.get("token_logprobs") if isinstance(logprobs, dict) else logprobs)
    if len(values) < len(ids):
        # vLLM's own field, for servers that refuse or ignore `echo`.
        tokens = _choice(url, asked | {"prompt_logprobs": 1}, until).get("prompt_logprobs")
        entries = [*zip(ids, tokens, strict=False)] if isinstance(tokens, list) else []
        own = [entry.get(str(token)) if isinstance(entry, dict) else entry for token, entry in entries]
        values = _numbers(url, [entry.get("logprob") if isinstance(entry, dict) else entry for entry in own])
    known = [value for value in values[1 : len(ids)] if value is not None]
    if len(known) != len(ids) - 1:
        raise UserError(
            f"server {url} returns {len(known)} log-probabilities for a text of {len(ids)} tokens: it must support "
            "`echo` with `logprobs`, or vLLM's `prompt_logprobs`"
        )
    return [-value for value in known]


def _choice(url: str, content: dict[str, Any], until: float) -> dict[str, Any]:
    """Return the first choice of a completion."""
    choices = _ask(url, content, until).get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise UserError(f"the answer of {url}: {_CHOICES}")
    first: dict[str, Any] = choices[0]
    return first


def _numbers(url: str, values: Any) -> list[float | None]:
    """Return log-probabilities, of which some may be null."""
    # Rounding may make the logarithm of 1 a little more than 0.
    values = [] if values is None else values
    if not isinstance(values, list) or not all(
        value is None or (type(value) in (int, float) and -1e5 <= value <= 1e-3) for value in values
    ):
        raise UserError(f"the answer of {url}: {_CHOICES}")
    return values


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Makes a redirect an error, since it may lead to any address."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _ask(url: str, content: dict[str, Any] | None, until: float) -> dict[str, Any]:
    """Return an answer in JSON; without content the request is a GET."""
    if not url.startswith(("http://", "https://")):
        raise UserError(f"--served {url!r}: must begin with http:// or https://")
    data = None if content is None else json.dumps(content).encode()
    seconds, answer = until - time.monotonic(), Future[bytes]()

    def fetch() -> bytes:
        asked = urllib.request.Request(url, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.build_opener(_NoRedirects).open(asked, timeout=max(1e-3, seconds)) as response:
                return bytes(response.read(_MOST_BYTES + 1))
        except urllib.error.HTTPError as error:
            said = f"({error.reason}): {' '.join(error.read(500).decode(errors='replace').split())}"
            said = "".join(char for char in said if char.isprintable()).rstrip(": ")
            raise UserError(f"server {url} answers with status {error.code} {said}") from error

    def request() -> None:
        try:
            answer.set_result(fetch())
        except Exception as error:
            answer.set_exception(error)

    # A server that sends a byte at a time, or a name server that does not answer, has no time-out of its own.
    Thread(target=request, daemon=True).start()
    try:
        body = answer.result(max(0.0, seconds))
    except TimeoutError as error:
        raise UserError(f"server {url} has not answered within {seconds:.1f} seconds") from error
    except (OSError, ValueError, HTTPException) as error:
        raise UserError(f"server {url} can't be asked: {getattr(error, 'reason', None) or repr(error)}") from error
    if len(body) > _MOST_BYTES:
        raise UserError(f"server {url} answers with more than {_MOST_BYTES / 1e6:g} MB")
    try:
        parsed = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise UserError(f"the answer of {url} is not valid JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise UserError(f"the answer of {url} is not a mapping")
    return parsed

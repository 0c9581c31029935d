"""Whether an OpenAI-compatible server computes with an adapter, with the base, or with something else.

The server is asked for the log-probability of each token of a text, which needs no sampling. How far they lie on the
way from the base's to the adapter's says what is served: 1 is the adapter, 0 the base, and 0.5 the adapter at half of
its scale.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lorabench.audit.finding import Finding
from lorabench.check.merging import effect_share
from lorabench.check.probe import Probe, finding, token_nlls
from lorabench.errors import UserError

Answer = Literal["adapter", "base", "neither", "unknown"]
_SECONDS = 120.0
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
    serves: Answer
    strength: float | None
    """How far on the way from the base to the adapter it is."""
    nll: float
    base_nll: float
    adapter_nll: float
    from_base: float
    """Root mean square over tokens of the difference of NLL, in nats."""
    from_adapter: float
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
        seconds: how long to wait for an answer.

    Raises:
        UserError: the server can't be reached, or does not answer with log-probabilities of the text.
    """
    root = url.rstrip("/").removesuffix("/v1")
    names = [name] if name else [model["id"] for model in _field(_ask(f"{root}/v1/models", None, seconds), "data", url)]
    if not names:
        raise UserError(f"server {url} names no model")
    rows = [_compare(probe, each, torch.tensor(_nlls(root, each, probe.ids.tolist(), seconds))) for each in names]
    findings = list(probe.findings)
    if not any(row.serves == "adapter" for row in rows):
        level: Literal["error", "warning"] = "warning" if any(row.serves == "unknown" for row in rows) else "error"
        message = f"no model of {url} serves the adapter: {'; '.join(row.verdict for row in rows)}"
        findings.append(finding("served", level, message, "the server's log-probabilities"))
    return ServedModels(url, str(probe.adapter), len(probe.ids), tuple(rows), tuple(findings))


def _compare(probe: Probe, name: str, nlls: Tensor) -> Served:
    base, full = (token_nlls(computed, probe.ids) for computed in (probe.base_logits, probe.adapter_logits))
    way, from_base, from_adapter = (_rms(gap) for gap in (full - base, nlls - base, nlls - full))
    strength = effect_share(base, full, nlls, base)
    serves: Answer = "neither"
    if way < _TELLING or strength is None:
        serves = "unknown"
        sentence = f"base and adapter differ by {way:.2g} nats per token on this text, too little to tell them apart"
    else:
        rest = _rms(nlls - base - strength * (full - base))
        # What is not on the way between them must be rounding.
        if rest <= max(_NOISE, way / 2):
            serves = "adapter" if abs(strength - 1) <= _NEAR else "base" if abs(strength) <= _NEAR else "neither"
        sentence = f"model {name!r} serves {'the ' if serves != 'neither' else ''}{serves}"
        sentence += " of them" if serves == "neither" else ""
        sentence += f": it has {strength:.0%} of the adapter's effect, and {rest:.2g} nats per token besides"
    own_nll, base_nll, adapter_nll = (float(values.mean()) for values in (nlls, base, full))
    return Served(name, serves, strength, own_nll, base_nll, adapter_nll, from_base, from_adapter, sentence)


def _rms(values: Tensor) -> float:
    return float(values.double().square().mean().sqrt())


def _nlls(root: str, name: str, ids: list[int], seconds: float) -> list[float]:
    """Return a served model's NLL of each token but the first."""
    asked = {"model": name, "prompt": ids, "max_tokens": 1, "temperature": 0}
    url = f"{root}/v1/completions"
    [choice, *_] = _field(_ask(url, asked | {"echo": True, "logprobs": 1}, seconds), "choices", url)
    values = (choice.get("logprobs") or {}).get("token_logprobs") or []
    if len(values) < len(ids):
        # vLLM's own field, for servers that refuse or ignore `echo`.
        [choice, *_] = _field(_ask(url, asked | {"prompt_logprobs": 1}, seconds), "choices", url)
        by_token = choice.get("prompt_logprobs") or []
        values = [
            None if tokens is None else tokens[str(own)]["logprob"] for own, tokens in zip(ids, by_token, strict=False)
        ]
    known = [value for value in values[1 : len(ids)] if isinstance(value, int | float)]
    if len(known) != len(ids) - 1:
        raise UserError(
            f"server {url} returns {len(known)} log-probabilities for a text of {len(ids)} tokens: it must support "
            "`echo` with `logprobs`, or vLLM's `prompt_logprobs`"
        )
    return [-value for value in known]


def _field(answer: Any, name: str, url: str) -> list[dict[str, Any]]:
    value = answer.get(name) if isinstance(answer, dict) else None
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise UserError(f"server {url} answers without a list {name!r}: it is not compatible with OpenAI's")
    return value


def _ask(url: str, content: dict[str, Any] | None, seconds: float) -> Any:
    """Return the JSON of an answer; without content the request is a GET."""
    if not url.startswith(("http://", "https://")):
        raise UserError(f"--served {url!r}: must begin with http:// or https://")
    data = None if content is None else json.dumps(content).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=seconds) as answer:
            return json.loads(answer.read())
    except urllib.error.HTTPError as error:
        text = error.read(500).decode(errors="replace").strip().replace("\n", " ")
        raise UserError(f"server {url} answers with status {error.code} ({error.reason}): {text}") from error
    except TimeoutError as error:
        raise UserError(f"server {url} has not answered within {seconds:g} seconds") from error
    except (OSError, ValueError) as error:
        raise UserError(f"server {url} can't be asked: {getattr(error, 'reason', error)}") from error

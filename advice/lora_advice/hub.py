"""Small files of the Hugging Face hub, which the extra `hub` looks up where a user asks for it."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from threading import Thread
from typing import Literal

from lora_advice.errors import UserError

_SECONDS = 2.0
"""Time in which the hub must answer, the look-up of the server's name included."""


def look_up(name: str, file: str | None = None, kind: Literal["model", "dataset"] = "model") -> str:
    """Return the text of a small file of a repository, from the hub's cache or else by one request to the hub.

    Without a file, return what the hub says of the repository, which shows that it is there.

    Raises:
        UserError: the repository or its file is not on the hub, the hub does not answer within two seconds, or its
            client is not installed.
    """
    try:
        from huggingface_hub import constants, get_session, hf_hub_url, hf_raise_for_status, try_to_load_from_cache
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]
    except ImportError as error:
        raise UserError(f"{kind} {name} needs the hub: pip install 'lora-advice[hub]'") from error

    url = f"{constants.ENDPOINT}/api/{kind}s/{name}"
    if file is not None:
        cached = try_to_load_from_cache(name, file, repo_type=kind)
        if isinstance(cached, str):
            return Path(cached).read_text(encoding="utf-8")
        url = hf_hub_url(name, file, repo_type=kind)
    answer: Future[str] = Future()

    def request() -> None:
        try:
            response = get_session().get(url, headers=build_hf_headers(), timeout=_SECONDS)
            hf_raise_for_status(response)
            answer.set_result(response.text)
        except Exception as error:
            answer.set_exception(error)

    # A name server that does not answer blocks for longer than the request's own time-out.
    Thread(target=request, daemon=True).start()
    try:
        return answer.result(_SECONDS)
    except TimeoutError as error:
        raise UserError(f"{kind} {name} can't be fetched: no answer from {constants.ENDPOINT}") from error
    except Exception as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"{kind} {name} can't be fetched from {constants.ENDPOINT}: {reason}") from error

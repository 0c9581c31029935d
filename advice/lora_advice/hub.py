"""Small files of models on the Hugging Face hub, which the extra `hub` looks up where a user asks for it."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from threading import Thread

from lora_advice.errors import UserError

SECONDS = 2.0
"""Time in which the hub must answer, the look-up of the server's name included."""


def look_up(name: str, file: str) -> str:
    """Return the text of a small file of a model, from the hub's cache or else by one request to the hub.

    Raises:
        UserError: the model or its file is not on the hub, the hub does not answer in time, or its client is not
            installed.
    """
    try:
        from huggingface_hub import constants, get_session, hf_hub_url, hf_raise_for_status, try_to_load_from_cache
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]
    except ImportError as error:
        raise UserError(f"model {name} needs the hub: pip install 'lora-advice[hub]'") from error
    cached = try_to_load_from_cache(name, file)
    if isinstance(cached, str):
        return Path(cached).read_text(encoding="utf-8")
    answer: Future[str] = Future()

    def request() -> None:
        try:
            response = get_session().get(hf_hub_url(name, file), headers=build_hf_headers(), timeout=SECONDS)
            hf_raise_for_status(response)
            answer.set_result(response.text)
        except Exception as error:
            answer.set_exception(error)

    # A name server that does not answer blocks for longer than the request's own time-out.
    Thread(target=request, daemon=True).start()
    try:
        return answer.result(SECONDS)
    except TimeoutError as error:
        raise UserError(f"model {name} can't be fetched: no answer from {constants.ENDPOINT}") from error
    except Exception as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"model {name} can't be fetched from {constants.ENDPOINT}: {reason}") from error

"""Small files of models on the Hugging Face hub, which the extra `hub` looks up where a user asks for it."""

from __future__ import annotations

from pathlib import Path

from lora_advice.errors import UserError

SECONDS = 2.0
"""Time in which the hub must begin to answer."""


def look_up(name: str, file: str) -> str:
    """Return the text of a small file of a model, from the hub or its cache; raises UserError if that does not work."""
    try:
        from huggingface_hub import constants, hf_hub_download
    except ImportError as error:
        raise UserError(f"model {name} needs the hub: pip install 'lora-advice[hub]'") from error
    try:
        return Path(hf_hub_download(name, file, etag_timeout=SECONDS)).read_text(encoding="utf-8")
    except Exception as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"model {name} can't be fetched from {constants.ENDPOINT}: {reason}") from error

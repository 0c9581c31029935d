"""The chat template that a preset gives to a base model that has none."""

from __future__ import annotations

from pathlib import Path

# A line break precedes each turn's text, so that a tokenizer can't merge the turn's first word with the text before it.
PLAIN = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].capitalize() + ':\n' }}{% endif %}"
    "{{ message['content'] | trim }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{{ '\n\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:\n' }}{% endif %}"
)
"""The template `plain`: a heading above each turn, and the model's end token after each turn of the assistant."""


def template_text(setting: str) -> str:
    """Return the template that a model's `chat_template` names: `plain`, or the path of a Jinja file."""
    return PLAIN if setting == "plain" else Path(setting).read_text(encoding="utf-8")

"""The chat template that a preset gives a base model without one."""

from __future__ import annotations

from pathlib import Path

# A line break before each turn's text, so that a tokenizer can't join the turn's first word to what comes before it.
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
"""`plain`: a heading above each turn, the model's end token after each of the assistant's."""


def template_text(setting: str) -> str:
    """The template that a model's `chat_template` names: `plain`, or a Jinja file."""
    return PLAIN if setting == "plain" else Path(setting).read_text(encoding="utf-8")

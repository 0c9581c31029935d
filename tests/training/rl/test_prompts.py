"""Prompts, stops and texts of a problem set for one model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from lorabench.errors import UserError
from lorabench.models.base import load_tokenizer
from lorabench.training.rl.loop import ProblemTexts
from lorabench.training.rl.sampler import Response

from .conftest import ROLLOUTS, TINY, problem_file


@pytest.fixture
def own_tokenizer():
    """A tokenizer that a test may change."""
    return load_tokenizer(TINY)


def test_a_prompt_is_the_chat_up_to_the_assistant_and_what_closes_a_turn_ends_a_response(own_tokenizer):
    texts = ProblemTexts(own_tokenizer, ROLLOUTS, 512)
    assert own_tokenizer.decode(texts.prompt("What is 1 + 1?")) == "<|user|>What is 1 + 1?<|assistant|>"
    assert texts.stop.tokens == (own_tokenizer.eos_token_id,)
    own_tokenizer.chat_template = own_tokenizer.chat_template.replace("<|end|>", "<|pad|>")
    both = {own_tokenizer.eos_token_id, own_tokenizer.pad_token_id}
    assert set(ProblemTexts(own_tokenizer, ROLLOUTS, 512).stop.tokens) == both


def test_a_plain_prompt_needs_no_template(own_tokenizer, tmp_path):
    own_tokenizer.chat_template = None
    texts = ProblemTexts(own_tokenizer, replace(ROLLOUTS, prompt="Question: {question}\nAnswer:", stop=("\n",)), 512)
    assert own_tokenizer.decode(texts.prompt("{x} + 1?")) == "Question: {x} + 1?\nAnswer:"
    assert texts.stop.tokens == (own_tokenizer.eos_token_id,)
    said = np.array(own_tokenizer(" 12\nQuestion").input_ids)
    assert texts.text(Response(said, np.zeros(len(said)), False)) == " 12"
    with pytest.raises(UserError, match="no chat template; give the RL experiment a `prompt`"):
        ProblemTexts(own_tokenizer, ROLLOUTS, 512).read(problem_file(tmp_path))


def test_what_does_not_fit_the_model_is_refused(tokenizer, tmp_path):
    with pytest.raises(UserError, match="a response of 8 is more than the 40 tokens that the model takes"):
        ProblemTexts(tokenizer, ROLLOUTS, 40).read(problem_file(tmp_path))

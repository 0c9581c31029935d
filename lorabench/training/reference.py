"""Training as the paper describes it, in loops without abstractions: SFT and RL, by LoRA or by full fine-tuning.

This file is for reading. The rest of the package computes the same, faster, in bounded memory, on several GPUs, and
goes on after interruptions; it shares no code with this file, and tests/training/test_reference.py holds its losses and
weights to those computed here. Everything is in fp32 on the CPU, one sequence at a time.

An example of SFT is a pair of lists: token ids, and for each token whether its prediction counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

Example = tuple[Sequence[int], Sequence[bool]]
"""Token ids, and for each token whether its prediction counts."""
Drawn = tuple[list[int], list[float]]
"""The tokens of a response, and the log-probability in nats that each had when it was drawn."""

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
"""All linear layers of the Llama and Qwen families, the unembedding included."""


def load(folder: str | Path, rank: int | None, alpha: float, seed: int) -> Any:
    """Load a base model, and put LoRA on it unless the rank is None.

    W' = W + (alpha/r) B A, where A is uniform in +-1/sqrt(d_in), drawn from the seed, and B is zero.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    if rank is None:
        return model
    torch.manual_seed(seed)
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=alpha, target_modules=LAYERS, lora_dropout=0.0))


def adam(model: Any, lr: float, eps: float) -> torch.optim.Optimizer:
    """Return Adam over the trained weights at a constant LR, without warm-up and weight decay."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.Adam(trained, lr=lr, betas=(0.9, 0.95), eps=eps)


def batches(n: int, steps: int, size: int, seed: int) -> np.ndarray:
    """Return the indices of each step's batch of n items, (steps, size): a new shuffle of all items in each epoch."""
    rng = np.random.default_rng(seed)
    epochs = -(-steps * size // n)
    return np.concatenate([rng.permutation(n) for _ in range(epochs)])[: steps * size].reshape(steps, size)


def logprobs(model: Any, ids: Sequence[int]) -> Tensor:
    """Return the log-probability of each token after the first, given those before it, (len(ids) - 1,), in nats."""
    tokens = torch.tensor([list(ids)])
    distribution = model(input_ids=tokens[:, :-1], use_cache=False).logits[0].log_softmax(-1)
    chosen: Tensor = distribution.gather(-1, tokens[0, 1:, None])[:, 0]
    return chosen


def nll(model: Any, examples: Sequence[Example]) -> Tensor:
    """Return the loss of SFT: the mean NLL of all scored tokens of some examples, in nats per token."""
    total, count = torch.zeros(()), 0
    for ids, scored in examples:
        counts = torch.tensor(list(scored[1:]))
        total = total - logprobs(model, ids)[counts].sum()
        count += int(counts.sum())
    return total / count


def train_sft(
    folder: str | Path,
    examples: Sequence[Example],
    steps: int,
    batch_size: int,
    lr: float,
    rank: int | None = None,
    alpha: float = 32.0,
    seed: int = 0,
    eps: float = 1e-8,
) -> tuple[list[float], Any]:
    """Fine-tune a model on examples; return each step's loss before its update, in nats per token, and the model.

    The LR is constant, and about ten times as high for LoRA as for full fine-tuning, which has no rank. The order of
    examples and LoRA's A are drawn from the seed.
    """
    model = load(folder, rank, alpha, seed)
    optimizer = adam(model, lr, eps)
    losses = []
    for batch in batches(len(examples), steps, batch_size, seed):
        loss = nll(model, [examples[index] for index in batch])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, model


def policy_loss(model: Any, groups: Sequence[tuple[Sequence[int], Sequence[Drawn], Sequence[float]]]) -> Tensor:
    """Return the loss of RL, a policy gradient with importance ratios.

    It is minus the mean over responses of the sum over tokens of p_learner / p_sampler times the advantage, which is
    the reward minus the mean reward of the group. There is no KL term, no clipping and no entropy bonus.

    A group has a problem's prompt, some responses to it, and their rewards.
    """
    total, count = torch.zeros(()), 0
    for prompt, responses, rewards in groups:
        mean = sum(rewards) / len(rewards)
        for (tokens, sampled), reward in zip(responses, rewards, strict=True):
            learned = logprobs(model, [*prompt, *tokens])[len(prompt) - 1 :]
            ratio = (learned - torch.tensor(list(sampled))).exp()
            total = total - (ratio * (reward - mean)).sum()
            count += 1
    return total / count


def generate(model: Any, prompt: Sequence[int], group_size: int, max_new_tokens: int, end: int) -> list[Drawn]:
    """Draw responses by transformers, at temperature 1 from the whole vocabulary, up to the token `end`."""
    ids = torch.tensor([list(prompt)]).expand(group_size, -1)
    drawn = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=True,
        top_k=0,
        max_new_tokens=max_new_tokens,
        eos_token_id=end,
        pad_token_id=end,
        return_dict_in_generate=True,
        output_logits=True,
    )
    responses = []
    for row, tokens in enumerate(drawn.sequences[:, len(prompt) :].tolist()):
        length = tokens.index(end) + 1 if end in tokens else len(tokens)
        sampled = [drawn.logits[i][row].log_softmax(-1)[tokens[i]].item() for i in range(length)]
        responses.append((tokens[:length], sampled))
    return responses


def train_rl(
    folder: str | Path,
    prompts: Sequence[Sequence[int]],
    reward: Callable[[int, Sequence[int]], float],
    draw: Callable[[Any, int, int], list[Drawn]],
    steps: int,
    problems_per_step: int,
    lr: float,
    rank: int | None = None,
    alpha: float = 32.0,
    seed: int = 0,
    eps: float = 1e-8,
) -> tuple[list[float], list[float], Any]:
    """Train a model by RL on problems; return each step's loss and mean reward before its update, and the model.

    Args:
        prompts: the tokens of each problem's prompt.
        reward: the reward of a response to a problem, given the problem's index and the response's tokens.
        draw: draws a group of responses, given the model, the step and the problem's index, for instance
            `lambda model, step, problem: generate(model, prompts[problem], 16, 256, end)`.
        problems_per_step: problems per step, each with a group of responses.
    """
    model = load(folder, rank, alpha, seed)
    optimizer = adam(model, lr, eps)
    losses, rewards = [], []
    for step, problems in enumerate(batches(len(prompts), steps, problems_per_step, seed), 1):
        groups = []
        for problem in problems:
            responses = draw(model, step, int(problem))
            groups.append((prompts[problem], responses, [reward(int(problem), tokens) for tokens, _ in responses]))
        loss = policy_loss(model, groups)
        loss.backward()
        # Where all rewards are equal within their groups there is no gradient, and Adam's momentum must move nothing.
        if any(len(set(group_rewards)) > 1 for _, _, group_rewards in groups):
            optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        rewards.append(float(np.mean([group_rewards for _, _, group_rewards in groups])))
    return losses, rewards, model

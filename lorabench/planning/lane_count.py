"""The number of lanes of a sweep: the runs that are trained together in one process. Does not import torch.

Lanes fill a machine that one run leaves idle, and gain nothing where one run fills it; they must fit into the memory
of the GPUs that one run needs. The number follows from preset and sweep alone, so that a job that was killed resumes in
the same lanes.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Literal

from lorabench.config.execution import Execution
from lorabench.config.preset import Preset
from lorabench.models.dimensions import dimensions, merging_is_cheaper
from lorabench.planning.flops import longest_sequence, tokens_per_example
from lorabench.runs import AROUND, EXPECTED_FURTHER_LRS, Condition, Run, Sweep
from lorabench.utils.gpus import GPUS

Work = Literal["lora", "fullft", "drawing"]
"""The purpose of a pass through a model: SFT by LoRA or by full fine-tuning, or drawing the responses of RL."""

# Tokens of one run's batch (in drawing: responses, each one token at a time) times the model's width that keep a CPU
# thread busy. Measured with 1 and 2 threads on batches of the laptop preset (tests/planning/test_lane_count.py has the
# table): LoRA still gained at 262,144 for each thread; full fine-tuning, and LoRA by merged weights, up to about
# 80,000, and no more at 170,000. Drawing responses gained up to 32,768 and no more above.
_BUSY_THREAD: dict[Work, int] = {"lora": 1_048_576, "fullft": 327_680, "drawing": 65_536}


def lane_count(preset: Preset, sweep: Sweep, gpus: int) -> int:
    """Return the number of a sweep's runs that are trained together on `gpus` GPUs, one process each (0: a CPU).

    It is 1 where the model is sharded or has experts, and in full fine-tuning by RL.
    """
    condition, execution = sweep.condition, preset.execution
    sharded = gpus > 1 and execution.sharding == "fsdp"
    rl_of_all_weights = condition.method == "fullft" and condition.rollouts is not None
    if sharded or rl_of_all_weights or dimensions(preset.models[condition.model]).experts:
        return 1
    largest_group = max(map(len, _groups(preset, sweep, execution.lanes)))
    most = min(execution.lanes, largest_group, _most_that_save_time(preset, condition))
    # The fewest lanes that take the fewest turns: five runs are dealt as three and two rather than as four and one.
    work = _work(preset, condition)
    turns_by_lanes = {
        lanes: turns(preset, sweep, lanes) for lanes in range(1, most + 1) if keeps_threads_busy(execution, work, lanes)
    }
    return min(turns_by_lanes, key=lambda lanes: (turns_by_lanes[lanes], lanes))


def turns(preset: Preset, sweep: Sweep, lanes: int) -> int:
    """Return the number of groups of at most `lanes` runs, trained one after the other, that a sweep's runs make."""
    return len(_groups(preset, sweep, lanes))


def deal(preset: Preset, runs: Iterable[Run], lanes: int) -> list[list[Run]]:
    """Deal runs of one condition into groups of at most `lanes`, which are trained together.

    In full fine-tuning on a CPU the runs of a group have the same seed: batches of different seeds are padded to the
    longest example of any of them, about a tenth more tokens, while lanes gain less there (3 to 4% with one thread and
    equal seeds).
    """
    groups: dict[int, list[Run]] = defaultdict(list)
    for run in runs:
        by_seed = preset.execution.gpu is None and run.condition.method == "fullft"
        groups[run.seed if by_seed else 0].append(run)
    return [group[start : start + lanes] for group in groups.values() for start in range(0, len(group), lanes)]


def lanes_that_fill(execution: Execution, work: Work, tokens: float, hidden: int) -> int:
    """Return the number of lanes that fill the machine (a CPU's threads, or one GPU), at least 1.

    Args:
        tokens: tokens of a lane's average batch, or of the part of it that goes through the model at once.
        hidden: the model's width.
    """
    full = execution.threads * _BUSY_THREAD[work] if execution.gpu is None else GPUS[execution.gpu].busy
    return max(1, int(full / (tokens * hidden)))


def keeps_threads_busy(execution: Execution, work: Work, lanes: int) -> bool:
    """Return whether all of a CPU's threads but at most a fifth are busy, where each thread computes whole lanes.

    It matters for full fine-tuning on a CPU, whose products are stacked over lanes: three lanes on two threads took a
    tenth longer than each run alone. LoRA's largest products are not stacked, so for LoRA the answer is always true.
    """
    if lanes == 1 or execution.gpu is not None or work != "fullft":
        return True
    return -(-lanes // execution.threads) * execution.threads <= 1.2 * lanes


def _most_that_save_time(preset: Preset, condition: Condition) -> int:
    """Return the number of lanes beyond which lanes save no time, at least 1."""
    execution, model = preset.execution, preset.models[condition.model]
    longest = longest_sequence(preset, condition)
    if condition.rollouts is None:
        batch = condition.batch_size * tokens_per_example(model, preset.datasets[condition.dataset])
        tokens = min(batch, float(max(longest, execution.max_batch_tokens)))
    else:
        tokens = condition.batch_size
    # Lanes share `max_batch_tokens`, which must have room for the longest example of each.
    within = execution.max_batch_tokens // longest
    return max(1, min(within, lanes_that_fill(execution, _work(preset, condition), tokens, dimensions(model).hidden)))


def _work(preset: Preset, condition: Condition) -> Work:
    """Return the kind of work that takes most of a condition's time."""
    if condition.rollouts is not None:
        # Drawing takes longer than learning, because it computes one position of all responses at a time.
        return "drawing"
    width = dimensions(preset.models[condition.model]).hidden
    # With merged weights LoRA computes the same products as full fine-tuning.
    merged = condition.rank and preset.protocol.precision == "fp32" and merging_is_cheaper(condition.rank, width, width)
    return "fullft" if merged else condition.method


def _groups(preset: Preset, sweep: Sweep, lanes: int) -> list[list[Run]]:
    """Return the groups of each of the waves that are expected."""
    runs = [Run(sweep.condition, math.nan, seed) for seed in sweep.expected_seeds()]
    waves = [sweep.grid(), runs]
    if sweep.lattice is not None:
        steps, around = min(EXPECTED_FURTHER_LRS, sweep.lattice.further), AROUND * (sweep.seeds.around - 1)
        walk, after = [[run] for run in runs[:steps]], runs[steps:]
        waves = [sweep.grid(), *walk, after[:around], after[around:]]
    return [group for wave in waves for group in deal(preset, wave, lanes)]

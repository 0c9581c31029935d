"""How many runs of a sweep are trained together in one process, as its lanes. No torch.

As many as pay: lanes fill a machine that one run leaves idle, and give nothing where one run fills it. Never more than
fit, on the same GPUs that one run needs. The number follows from preset and sweep alone, so that a job that was killed
goes on in the same lanes.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

from lorabench.config import Preset
from lorabench.gpus import GB, GPUS
from lorabench.lengths import longest_sequence, tokens_per_example
from lorabench.memory import USABLE, peak_bytes
from lorabench.models.dimensions import dimensions, merges

if TYPE_CHECKING:
    from lorabench.config import Execution
    from lorabench.plan import Condition, Run, Sweep

Work = Literal["lora", "fullft", "drawing"]
"""What a pass through a model is for: training by a method of SFT, or drawing responses."""

# Tokens of one run's batch, or of one position of all its responses, times the model's width that keep a CPU thread
# busy. Measured with 1 and 2 threads, on batches of the laptop preset (the table is in tests/test_lanes.py): LoRA still
# gained at 262,144 for each thread; full fine-tuning, and LoRA by merged weights, up to about 80,000, and no more at
# 170,000. Drawing responses gained up to 32,768 and no more above.
_BUSY_THREAD: dict[Work, int] = {"lora": 1_048_576, "fullft": 327_680, "drawing": 65_536}
# Bytes of a job on a CPU for each of its threads, beyond which it takes fewer lanes: clusters commonly have so much.
_CPU_MEMORY = 4 * GB


def lanes_of(preset: Preset, sweep: Sweep, gpus: int) -> int:
    """Runs of a sweep that are trained together by so many GPUs, a process for each (0: a CPU); at least 1.

    One where the model is sharded or has experts, and in full fine-tuning by RL.
    """
    condition, execution = sweep.condition, preset.execution
    sharded = gpus > 1 and execution.sharding == "fsdp"
    by_itself = condition.method == "fullft" and condition.rollouts is not None
    if sharded or by_itself or dimensions(preset.models[condition.model]).experts:
        return 1
    most = min(execution.lanes, max(map(len, _groups(preset, sweep, execution.lanes))), _paying(preset, condition))
    while most > 1 and not _fit(preset, sweep, gpus, most):
        most -= 1
    # Five runs are three and two rather than four and one.
    work = _work(preset, condition)
    taken = {lanes: turns(preset, sweep, lanes) for lanes in range(1, most + 1) if busy(execution, work, lanes)}
    return min(taken, key=lambda lanes: (taken[lanes], lanes))


def turns(preset: Preset, sweep: Sweep, lanes: int) -> int:
    """How often so many lanes are filled, one after the other, until all runs of a sweep are trained."""
    return len(_groups(preset, sweep, lanes))


def dealt(preset: Preset, runs: Iterable[Run], lanes: int) -> list[list[Run]]:
    """Runs of one condition, in groups of at most so many that are trained together.

    In full fine-tuning on a CPU they are of one seed: batches of different seeds are padded to the longest examples of
    any, by a tenth or so, which is more than these lanes gain there (3 to 4% for one thread where seeds are the same).
    """
    groups: dict[int, list[Run]] = defaultdict(list)
    for run in runs:
        apart = preset.execution.gpu is None and run.condition.method == "fullft"
        groups[run.seed if apart else 0].append(run)
    return [group[start : start + lanes] for group in groups.values() for start in range(0, len(group), lanes)]


def paying(execution: Execution, work: Work, tokens: float, hidden: int) -> int:
    """Lanes that a machine takes before it is full, at least 1.

    One of several GPUs; their number is not counted.

    Args:
        tokens: those of a lane's batch, on average, or as many as go through the model at once.
        hidden: the model's width.
    """
    full = execution.threads * _BUSY_THREAD[work] if execution.gpu is None else GPUS[execution.gpu].busy
    return max(1, int(full / (tokens * hidden)))


def busy(execution: Execution, work: Work, lanes: int) -> bool:
    """Whether a CPU's threads, each with whole lanes of stacked products, are busy but for a fifth.

    Three lanes on two threads took a tenth longer than each run alone. LoRA's largest products are not stacked.
    """
    if lanes == 1 or execution.gpu is not None or work != "fullft":
        return True
    return -(-lanes // execution.threads) * execution.threads <= 1.2 * lanes


def _paying(preset: Preset, condition: Condition) -> int:
    execution, model = preset.execution, preset.models[condition.model]
    longest = longest_sequence(preset, condition)
    if condition.rollouts is None:
        batch = condition.batch_size * tokens_per_example(model, preset.datasets[condition.dataset])
        tokens = min(batch, float(max(longest, execution.max_batch_tokens)))
    else:
        tokens = condition.batch_size
    # Lanes share the limit of tokens: it has room for an example of each.
    within = execution.max_batch_tokens // longest
    return max(1, min(within, paying(execution, _work(preset, condition), tokens, dimensions(model).hidden)))


def _work(preset: Preset, condition: Condition) -> Work:
    """What takes a condition's time."""
    if condition.rollouts is not None:
        # Drawing takes longer than learning: one position of all responses at a time.
        return "drawing"
    width = dimensions(preset.models[condition.model]).hidden
    # With merged weights LoRA has the products of full fine-tuning.
    merged = condition.rank and preset.protocol.precision == "fp32" and merges(condition.rank, width, width)
    return "fullft" if merged else condition.method


def _groups(preset: Preset, sweep: Sweep, lanes: int) -> list[list[Run]]:
    """Of the runs that are known from the start, then of those that wait for the best LR."""
    later = sweep.repeats(best_lr=math.nan)
    return dealt(preset, sweep.grid(), lanes) + dealt(preset, later, lanes)


def _fit(preset: Preset, sweep: Sweep, gpus: int, lanes: int) -> bool:
    execution = preset.execution
    available = _CPU_MEMORY * execution.threads if execution.gpu is None else USABLE * GPUS[execution.gpu].memory
    return peak_bytes(preset, sweep, gpus, lanes) <= available

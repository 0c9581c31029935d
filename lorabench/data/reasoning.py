"""Generated problems: all pretraining and fine-tuning text that needs no download is made of them.

Most are from reasoning-gym, in three disjoint pools, so that fine-tuning teaches what the tiny base hardly knows:
`PRETRAIN_TASKS` and the *even* gsm_symbolic templates make the pretraining text, `INSTRUCT_TASKS` the instruction
mixture, and the *odd* gsm_symbolic templates the worked solutions. One percent of the pretraining text comes from the
latter two, drawn with another seed. Every problem is a function of (task, seed, index): reasoning-gym builds item i
from `seed + i`.

The other source are sums of two numbers with written working: problems for RL, and texts of writers who make mistakes.
The working adds the digits column by column from the right, with what is carried as a third term, and the answer comes
last: `7+5=12 4+8+1=13 132` answers `47+85`. The bases that are pretrained on the texts of `written_sums` imitate a mix
of writers. Most never carry, a mistake of strategy; all make slips in adding two digits, some pairs of digits often and
some never, a mistake of knowledge. Greedy answers follow the majority, which never carries; some samples are right. RL
can therefore improve by a shift of strategy, and then pair by pair.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from random import Random
from types import MappingProxyType
from typing import Literal

PRETRAIN_TASKS = (
    *("aiw", "base_conversion", "basic_arithmetic", "calendar_arithmetic", "chain_sum", "coin_flip"),
    *("decimal_arithmetic", "decimal_chain_sum", "family_relationships", "fraction_simplification", "gcd", "lcm"),
    *("letter_counting", "letter_jumble", "number_filtering", "number_sorting", "prime_factorization", "products"),
    *("sentence_reordering", "simple_equations", "simple_geometry", "spell_backward", "syllogism", "word_sorting"),
)

INSTRUCT_TASKS = (
    *("bitwise_arithmetic", "caesar_cipher", "complex_arithmetic", "count_bits", "dice", "leg_counting"),
    *("number_format", "power_function", "ransom_note", "rotate_matrix", "time_intervals", "word_sequence_reversal"),
)


@dataclass(frozen=True)
class Problem:
    """A question with its short answer and, where the task has one, a worked solution."""

    source: str
    question: str
    answer: str
    solution: str | None = None

    @property
    def response(self) -> str:
        """The assistant's turn: the worked solution if there is one, else the answer."""
        return self.solution or self.answer

    @property
    def key(self) -> str:
        """The question with spaces normalized, which identifies the problem."""
        return " ".join(self.question.split())


def mixture(
    tasks: Sequence[str], seed: int, settings: Mapping[str, Mapping[str, int]] = MappingProxyType({})
) -> Iterator[Problem]:
    """Yield problems without end, each of a task of reasoning-gym drawn uniformly, with the settings of that task."""
    import reasoning_gym

    def problems(task: str) -> Iterator[Problem]:
        # reasoning-gym requires a size in advance; items are built on demand, so a large size costs nothing.
        dataset = reasoning_gym.create_dataset(task, seed=seed, size=10_000_000, **settings.get(task, {}))
        for index in count():
            item = dataset[index]
            # Some tasks have puzzles without a solution.
            if item["answer"] is not None:
                yield Problem(task, item["question"].strip(), str(item["answer"]).strip())

    rng, streams = Random(seed), [problems(task) for task in tasks]
    while True:
        yield next(rng.choice(streams))


def worked_solutions(templates: Literal["even", "odd"], seed: int) -> Iterator[Problem]:
    """Yield gsm_symbolic problems with their chain of thought without end.

    Of the 85 sound templates those with even or odd numbers are used; the seed decides their order and their numbers.
    """
    import reasoning_gym
    from reasoning_gym.arithmetic.gsm_symbolic.gsm_symbolic import tasks_ok

    generators = reasoning_gym.create_dataset("gsm_symbolic", seed=seed, size=1).generators
    chosen = [number for number in tasks_ok if number % 2 == ("even", "odd").index(templates)]
    rng = Random(seed)
    while True:
        number = rng.choice(chosen)
        item = generators[number](Random(rng.getrandbits(63)), 1.0)
        solution = item["metadata"]["answer_cot"].strip()
        yield Problem(f"gsm_symbolic/{number}", item["question"].strip(), str(item["answer"]).strip(), solution)


@dataclass(frozen=True)
class Writers:
    """A mix of writers of worked sums."""

    careless: float = 0.55  # The share of writers who never carry.
    most_slips: float = 0.75  # The rates of slips of the pairs of digits are spread evenly from 0 to this share.
    digits: tuple[int, ...] = (2, 2, 3, 3, 4)  # The numbers of digits of both terms, drawn uniformly.


CAREFUL = Writers(careless=0.0, most_slips=0.0)


def sum_problems(min_digits: int, max_digits: int, carries: int, seed: int) -> Iterator[Problem]:
    """Yield sums of two numbers of equally many digits without end, with a right working and at least so many carries.

    The number of digits is uniform from `min_digits` to `max_digits`.
    """
    rng = Random(seed)
    while True:
        first, second = _terms(rng, rng.randint(min_digits, max_digits))
        if n_carries(first, second) >= carries:
            working = written_sum(first, second, CAREFUL, rng)
            yield Problem("sums", f"{first}+{second}", str(first + second), working)


def n_carries(first: int, second: int) -> int:
    """Return how many columns of a sum, other than the leftmost, are 10 or more with what is carried into them."""
    places = range(1, len(str(first)))
    return sum(first % 10**place + second % 10**place >= 10**place for place in places)


def written_sums(writers: Writers, seed: int) -> Iterator[Problem]:
    """Yield sums with the working of a mix of writers without end; the answer is the right one."""
    rng = Random(seed)
    while True:
        first, second = _terms(rng, rng.choice(writers.digits))
        yield Problem("sums", f"{first}+{second}", str(first + second), written_sum(first, second, writers, rng))


def written_sum(first: int, second: int, writers: Writers, rng: Random) -> str:
    """Return the working of a writer drawn from a mix, of terms of equally many digits; it ends with the answer."""
    is_careless = rng.random() < writers.careless
    lines, answer, carried = [], "", 0
    for upper, lower in zip(reversed(str(first)), reversed(str(second)), strict=True):
        rate, slip = _SLIPS[min(upper, lower), max(upper, lower)]
        total = int(upper) + int(lower) + carried + (slip if rng.random() < rate * writers.most_slips else 0)
        lines.append(f"{upper}+{lower}{'+1' if carried else ''}={total}")
        answer = f"{total % 10}{answer}"
        carried = int(total >= 10 and not is_careless)
    # The leftmost column is written whole.
    return " ".join([*lines, f"{total}{answer[1:]}"])


def _terms(rng: Random, digits: int) -> tuple[int, int]:
    first, second = (rng.randrange(10 ** (digits - 1), 10**digits) for _ in range(2))
    return first, second


_RNG = Random(7)
_SLIPS = {
    (str(low), str(high)): (_RNG.random(), _RNG.choice((-1, 1)) if high else 1)
    for low in range(10)
    for high in range(low, 10)
}
"""For each pair of digits its rate of slips, as a share of the highest rate, and the error of a slip."""

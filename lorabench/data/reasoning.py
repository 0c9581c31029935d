"""Problems from reasoning-gym: all pretraining and fine-tuning text that needs no download is made of them.

There are three disjoint pools, so that fine-tuning teaches what the tiny base hardly knows:

- `PRETRAIN_TASKS` and the *even* gsm_symbolic templates make the pretraining text;
- `INSTRUCT_TASKS` make the instruction mixture;
- the *odd* gsm_symbolic templates make the worked solutions.

One percent of the pretraining text comes from the latter two, drawn with another seed.

Every problem is a function of (task, seed, index): reasoning-gym builds item i from `seed + i`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

PRETRAIN_TASKS = (
    "aiw",
    "base_conversion",
    "basic_arithmetic",
    "calendar_arithmetic",
    "chain_sum",
    "coin_flip",
    "decimal_arithmetic",
    "decimal_chain_sum",
    "family_relationships",
    "fraction_simplification",
    "gcd",
    "lcm",
    "letter_counting",
    "letter_jumble",
    "number_filtering",
    "number_sorting",
    "prime_factorization",
    "products",
    "sentence_reordering",
    "simple_equations",
    "simple_geometry",
    "spell_backward",
    "syllogism",
    "word_sorting",
)

INSTRUCT_TASKS = (
    "bitwise_arithmetic",
    "caesar_cipher",
    "complex_arithmetic",
    "count_bits",
    "dice",
    "leg_counting",
    "number_format",
    "power_function",
    "ransom_note",
    "rotate_matrix",
    "time_intervals",
    "word_sequence_reversal",
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


# reasoning-gym requires a size in advance; items are built on demand, so a large size costs nothing.
_ENDLESS = 10_000_000


def task_problems(task: str, seed: int, **settings: int) -> Iterator[Problem]:
    """Yield problems of a reasoning-gym task without end; `settings` are passed to the task.

    Raises:
        ValueError: reasoning-gym has no task of that name.
    """
    import reasoning_gym

    dataset = reasoning_gym.create_dataset(task, seed=seed, size=_ENDLESS, **settings)
    for index in range(_ENDLESS):
        item = dataset[index]
        # Some tasks have puzzles without a solution.
        if item["answer"] is not None:
            yield Problem(task, item["question"].strip(), str(item["answer"]).strip())


def mixture(tasks: tuple[str, ...], seed: int) -> Iterator[Problem]:
    """Yield problems without end, each from a task drawn uniformly."""
    return interleaved([task_problems(task, seed) for task in tasks], seed)


def interleaved(streams: list[Iterator[Problem]], seed: int) -> Iterator[Problem]:
    """Yield problems without end, each from a stream drawn uniformly."""
    rng = Random(seed)
    while True:
        yield next(rng.choice(streams))


def worked_solutions(template: Callable[[int], bool], seed: int) -> Iterator[Problem]:
    """Yield gsm_symbolic problems with their chain of thought without end.

    Args:
        template: returns whether to use a template, given the number of one of the 85 sound templates.
        seed: decides the templates and the numbers in them.
    """
    import reasoning_gym
    from reasoning_gym.arithmetic.gsm_symbolic.gsm_symbolic import tasks_ok

    generators = reasoning_gym.create_dataset("gsm_symbolic", seed=seed, size=1).generators
    chosen = [number for number in tasks_ok if template(number)]
    rng = Random(seed)
    while True:
        number = rng.choice(chosen)
        item = generators[number](Random(rng.getrandbits(63)), 1.0)
        solution = item["metadata"]["answer_cot"].strip()
        yield Problem(f"gsm_symbolic/{number}", item["question"].strip(), str(item["answer"]).strip(), solution)


def is_pretraining_template(template: int) -> bool:
    """Return whether a gsm_symbolic template belongs to the pretraining text."""
    return template % 2 == 0


def is_worked_template(template: int) -> bool:
    """Return whether a gsm_symbolic template belongs to the worked-solutions dataset."""
    return template % 2 == 1

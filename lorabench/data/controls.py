"""What a policy gets on a problem set without solving it: the best constant answer, and the best of five cheap rules.

A rule reads the numbers of a question and nothing else. One adds them without carries; the others are a start plus a
constant for each value of a feature, such as the parities of the first two numbers: "2 if both are even, else 1" is
such a rule. The constants are those that are right most often on the problems to train on.

The best rule is chosen on the problems to train on as well, and its accuracy is that on the test problems. A rule that
solves all problems to train on is the task itself and no control.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from lorabench.data.grading import number

Numbers = tuple[int, ...]
"""The whole numbers of a question, in their order."""

Exact = int | Fraction

Rule = Callable[[Numbers], Exact | None]
"""Returns an answer, or None where the rule gives none."""

Problem = tuple[Numbers, Exact | None]
"""A question's numbers and its answer, None for one that is no number."""

# Longer digits are split, since Python refuses to read very long ones.
_WHOLE = re.compile(r"\d{1,15}")
_MOST = 2000  # rules are fitted on so many problems at most


@dataclass(frozen=True)
class Controls:
    """The test accuracies, from 0 to 1, of answers that solve no problem."""

    constant: float
    """The accuracy of the most frequent answer."""
    rule: float
    """The accuracy of the best rule; at least that of the constant answer on the problems to train on."""
    rule_text: str
    """The description of the rule."""


def controls(train: Sequence[tuple[str, str]], test: Sequence[tuple[str, str]]) -> Controls:
    """Return the best constant answer and the best cheap rule.

    Args:
        train: questions and answers of the problems to train on, at least one; the answers may be any text. Rules are
            fitted on the first _MOST.
        test: questions and answers of the test problems, at least one.
    """
    constant = Counter(answer for _, answer in train).most_common(1)[0][0]
    constant_accuracy = sum(answer == constant for _, answer in test) / len(test)
    train = train[:_MOST]
    learned, tested = ([_parsed(*problem) for problem in problems] for problems in (train, test))
    share, text, accuracy = sum(answer == constant for _, answer in train) / len(train), f"always {constant}", None
    for name, rule in _rules(learned).items():
        if share < (rule_share := _accuracy(rule, learned)) < 1:
            share, text, accuracy = rule_share, name, _accuracy(rule, tested)
    return Controls(constant_accuracy, constant_accuracy if accuracy is None else accuracy, text)


def _parsed(question: str, answer: str) -> Problem:
    value = number(answer.strip())
    # With whole numbers Python is much faster than with fractions.
    exact = int(value) if value is not None and value.denominator == 1 else value
    return tuple(map(int, _WHOLE.findall(question))), exact


def _accuracy(rule: Rule, problems: Sequence[Problem]) -> float:
    right = sum(answer is not None and bool(numbers) and rule(numbers) == answer for numbers, answer in problems)
    return right / len(problems)


def _rules(problems: Sequence[Problem]) -> dict[str, Rule]:
    """Return the rules by their descriptions, fitted to problems."""

    def first_digits(numbers: Numbers) -> Hashable:
        return tuple(str(value)[0] for value in numbers)

    def zero(numbers: Numbers) -> int:
        return 0

    return {
        "the sum without carries": _sum_without_carries,
        "a constant for each pair of parities": _by_class(problems, zero, lambda n: tuple(v % 2 for v in n[:2])),
        "a constant for each tuple of first digits": _by_class(problems, zero, first_digits),
        "a constant for each tuple of last digits": _by_class(problems, zero, lambda n: tuple(v % 10 for v in n)),
        "the smallest + a constant for each tuple of first digits": _by_class(problems, min, first_digits),
    }


def _sum_without_carries(numbers: Numbers) -> int:
    places = range(max(len(str(value)) for value in numbers))
    return sum(sum(value // 10**place % 10 for value in numbers) % 10 * int(10**place) for place in places)


def _by_class(
    problems: Sequence[Problem], start: Callable[[Numbers], int], feature: Callable[[Numbers], Hashable]
) -> Rule:
    """Return the rule of a start plus the constant that is right most often in each class of a feature."""
    constants: dict[Hashable, Counter[Exact]] = defaultdict(Counter)
    for numbers, answer in problems:
        if answer is not None and numbers:
            constants[feature(numbers)][answer - start(numbers)] += 1
    frequent = {value: counted.most_common(1)[0][0] for value, counted in constants.items()}

    def rule(numbers: Numbers) -> Exact | None:
        constant = frequent.get(feature(numbers))
        return None if constant is None else start(numbers) + constant

    return rule

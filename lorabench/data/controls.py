"""What a policy gets on a problem set without solving it: the best constant answer, and the best cheap rule.

A rule reads the numbers of a question and nothing else. Two kinds are searched:

- an expression of the numbers: one of them, their sum, difference or product, their digits put together, added or
  multiplied, sums without carries, and the like;
- a start plus a constant for each value of a feature, such as whether all numbers are even, the last or the first digit
  of a number, or a remainder. The start is 0 or one of the numbers, and the constants are those that are right most
  often on the problems to train on. "2 if both numbers are even, else 1" is such a rule.

Rules are chosen and fitted on the problems to train on, and their accuracy is that on the test problems. A rule that
solves all problems to train on is the task itself and no control.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial

from lorabench.data.answers import number

Numbers = tuple[int, ...]
"""The whole numbers of a question, in their order."""

Exact = int | Fraction

Rule = Callable[[Numbers], Exact | None]
"""Returns an answer, or None where the rule gives none."""

Parsed = tuple[Numbers, Exact | None]
"""A question's numbers and its answer, None for one that is no number."""

# Longer digits are split, since Python refuses to read very long ones.
_WHOLE = re.compile(r"\d{1,15}")
_MOST = 2000  # rules are fitted on so many problems at most, which takes about a second
_FEW = 4  # so many numbers of a question have expressions of their own
_MODULI = (2, 3, 4, 5, 6, 10)


@dataclass(frozen=True)
class Controls:
    """The test accuracies, from 0 to 1, of answers that solve no problem."""

    constant: float
    """The accuracy of the most frequent answer."""
    rule: float
    """The accuracy of the best cheap rule; at least that of the constant answer on the problems to train on."""
    rule_text: str
    """The rule in words."""


def controls(train: Sequence[tuple[str, str]], test: Sequence[tuple[str, str]]) -> Controls:
    """Return the best constant answer and the best cheap rule.

    Args:
        train: questions and answers of the problems to train on, at least one; the answers may be any text. Rules are
            fitted on the first _MOST.
        test: questions and answers of the test problems, at least one.
    """
    constant = Counter(answer for _, answer in train).most_common(1)[0][0]
    of_constant = sum(answer == constant for _, answer in test) / len(test)
    train = train[:_MOST]
    learned, tested = _parsed(train), _parsed(test)
    best, best_share, text = None, sum(answer == constant for _, answer in train) / len(train), f"always {constant}"
    for name, rule in _rules(learned).items():
        share = _accuracy(rule, learned)
        if best_share < share < 1:
            best, best_share, text = rule, share, name
    return Controls(of_constant, of_constant if best is None else _accuracy(best, tested), text)


def _parsed(problems: Sequence[tuple[str, str]]) -> list[Parsed]:
    return [(tuple(map(int, _WHOLE.findall(question))), _exact(answer)) for question, answer in problems]


def _exact(answer: str) -> Exact | None:
    """Return the value of an answer; whole numbers as integers, with which Python is much faster."""
    value = number(answer.strip())
    return int(value) if value is not None and value.denominator == 1 else value


def _accuracy(rule: Rule, problems: Sequence[Parsed]) -> float:
    right = sum(answer is not None and bool(numbers) and rule(numbers) == answer for numbers, answer in problems)
    return right / len(problems)


def _rules(problems: Sequence[Parsed]) -> dict[str, Rule]:
    """Return all rules by name, those of two kinds that the module describes, fitted to problems."""
    rules = {name: _guarded(expression) for name, expression in _expressions().items()}
    for start_name, start in {"": _zero, **_operands()}.items():
        for feature_name, feature in _features().items():
            rule = _by_class(problems, start, feature)
            rules[f"{start_name and start_name + ' + '}a constant for each {feature_name}"] = rule
    return rules


def _guarded(expression: Callable[[Numbers], int]) -> Rule:
    """Return an expression as a rule; it has no answer where it is not defined."""

    def rule(numbers: Numbers) -> Exact | None:
        try:
            return expression(numbers)
        except (IndexError, ZeroDivisionError, ValueError):
            return None

    return rule


def _by_class(
    problems: Sequence[Parsed],
    start: Callable[[Numbers], int],
    feature: Callable[[Numbers], Hashable],
) -> Rule:
    """Return the rule of a start plus the constant that is right most often in each class of a feature."""
    constants: Mapping[Hashable, Counter[Exact]] = defaultdict(Counter)
    begin = _guarded(start)
    for numbers, answer in problems:
        first = begin(numbers)
        if first is not None and answer is not None and numbers:
            constants[feature(numbers)][answer - first] += 1
    frequent = {value: counted.most_common(1)[0][0] for value, counted in constants.items()}

    def rule(numbers: Numbers) -> Exact | None:
        first, constant = begin(numbers), frequent.get(feature(numbers))
        return None if first is None or constant is None else first + constant

    return rule


def _zero(numbers: Numbers) -> int:
    return 0


def _operands() -> dict[str, Callable[[Numbers], int]]:
    """Return single numbers of a question: by their place, and the extremes."""
    by_place = {f"number {place + 1}": partial(_at, place) for place in range(_FEW)}
    return {**by_place, "the last number": lambda numbers: numbers[-1], "the smallest": min, "the largest": max}


def _expressions() -> dict[str, Callable[[Numbers], int]]:
    return {
        **_operands(),
        "the sum": sum,
        "the product": math.prod,
        "the greatest common divisor": lambda numbers: math.gcd(*numbers),
        "the least common multiple": lambda numbers: math.lcm(*numbers),
        "number 1 - number 2": lambda numbers: numbers[0] - numbers[1],
        "number 2 - number 1": lambda numbers: numbers[1] - numbers[0],
        "number 1 over number 2": lambda numbers: numbers[0] // numbers[1],
        "number 1 modulo number 2": lambda numbers: numbers[0] % numbers[1],
        "the range": lambda numbers: max(numbers) - min(numbers),
        "the number of numbers": len,
        "numbers 1 and 2 put together": lambda numbers: int(f"{numbers[0]}{numbers[1]}"),
        "numbers 2 and 1 put together": lambda numbers: int(f"{numbers[1]}{numbers[0]}"),
        "the sum of all digits": lambda numbers: sum(map(int, "".join(map(str, numbers)))),
        "the sum without carries": lambda numbers: _columns(numbers, whole=False),
        "the sum without carries but for the leftmost column": lambda numbers: _columns(numbers, whole=True),
        "the sums of columns put together": lambda numbers: int("".join(map(str, reversed(_column_sums(numbers))))),
        "the sum of last digits": lambda numbers: sum(value % 10 for value in numbers),
        "the sum of first digits": lambda numbers: sum(int(str(value)[0]) for value in numbers),
    }


def _column_sums(numbers: Numbers) -> list[int]:
    """Return the sums of the digits in each column, from the right."""
    places = range(max(len(str(value)) for value in numbers))
    return [sum(value // 10**place % 10 for value in numbers) for place in places]


def _columns(numbers: Numbers, whole: bool) -> int:
    """Return the sum without carries, whose leftmost column is written whole or without its tens."""
    *others, leftmost = _column_sums(numbers)
    low = sum(total % 10 * int(10**place) for place, total in enumerate(others))
    return low + (leftmost if whole else leftmost % 10) * int(10 ** len(others))


def _features() -> dict[str, Callable[[Numbers], Hashable]]:
    """Return features of the numbers by name, each with few values."""
    features: dict[str, Callable[[Numbers], Hashable]] = {
        "question": lambda numbers: None,
        "pair of parities": lambda numbers: tuple(value % 2 for value in numbers[:2]),
        "answer to whether all are even": lambda numbers: all(value % 2 == 0 for value in numbers),
        "order of numbers 1 and 2": lambda numbers: (numbers[:1] > numbers[1:2]) - (numbers[:1] < numbers[1:2]),
        "tuple of lengths": lambda numbers: tuple(len(str(value)) for value in numbers),
        "tuple of first digits": lambda numbers: tuple(str(value)[0] for value in numbers),
        "tuple of last digits": lambda numbers: tuple(value % 10 for value in numbers),
        "answer to whether number 1 divides number 2 or the reverse": _divides,
    }
    for modulus in _MODULI:
        features[f"tuple of remainders modulo {modulus}"] = partial(_remainders, modulus)
        features[f"remainder of the sum modulo {modulus}"] = partial(_remainder_of_sum, modulus)
    return features


def _at(place: int, numbers: Numbers) -> int:
    return numbers[place]


def _remainders(modulus: int, numbers: Numbers) -> Numbers:
    return tuple(value % modulus for value in numbers)


def _remainder_of_sum(modulus: int, numbers: Numbers) -> int:
    return sum(numbers) % modulus


def _divides(numbers: Numbers) -> bool:
    low, high = min(numbers[:2]), max(numbers[:2])
    return low > 0 and high % low == 0

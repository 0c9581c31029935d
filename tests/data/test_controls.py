"""Controls: the best constant answer and the best cheap rule, on problem sets whose best rule is known."""

from __future__ import annotations

from itertools import islice, product
from random import Random

import pytest

from lorabench.data.problems import controls
from lorabench.data.reasoning import sum_problems


def asked(answer, numbers=range(2, 22), question="What is {} with {}?"):
    """Return questions on all pairs of numbers with the answers of a function."""
    return [(question.format(*pair), str(answer(*pair))) for pair in product(numbers, numbers)]


def with_others(problems, wrong):
    """Return the problems with another answer of one in ten, so that no rule is always right."""
    rng = Random(0)
    return [(question, wrong if rng.random() < 0.1 else answer) for question, answer in problems]


def test_a_rule_of_parities_is_found():
    problems = asked(lambda a, b: 2 if a % 2 == b % 2 == 0 else 1)
    # Right on nine tenths, so that it is not the task itself.
    noisy = with_others(problems, "7")
    found = controls(noisy, noisy)
    assert found.constant == sum(answer == "1" for _, answer in noisy) / len(noisy)
    assert found.rule == pytest.approx(0.9, abs=0.05)
    assert controls(problems, problems).rule < 1, "the rule that is always right is the task"


def test_every_rule_is_found_where_it_is_mostly_right():
    rules = {
        "the sum without carries": lambda a, b: (a // 10 + b // 10) % 10 * 10 + (a + b) % 10,
        "a constant for each tuple of first digits": lambda a, b: 100 + int(str(a)[0]) * int(str(b)[0]),
        "a constant for each tuple of last digits": lambda a, b: 100 + (a % 10) * (b % 10),
        "the smallest + a constant for each tuple of first digits": lambda a, b: min(a, b) + int(str(max(a, b))[0]),
    }
    for text, answer in rules.items():
        problems = asked(answer, range(10, 100, 3))
        found = controls(with_others(problems, "999"), problems)
        assert found.rule_text == text
        assert found.rule > 0.98


def test_a_rule_is_fitted_on_the_problems_to_train_on():
    train = [("3 and 4", "5"), ("3 and 5", "5"), ("3 and 6", "6")]
    found = controls(train, [("3 and 7", "5"), ("3 and 8", "6"), ("8 and 9", "6"), ("8 and 3", "6")])
    assert found.constant == 0.25


def test_questions_may_hold_very_long_numbers():
    found = controls([("9" * 5000, "1"), ("8" * 5000, "1")], [("7" * 5000, "1")])
    assert (found.constant, found.rule) == (1.0, 1.0)


def test_answers_may_be_any_text():
    found = controls([("What?", "\\frac{1}{2}"), ("Who?", "x")], [("Which?", "x")])
    assert (found.constant, found.rule, found.rule_text) == (0.0, 0.0, "always \\frac{1}{2}")


def test_no_cheap_rule_solves_sums_with_carries():
    problems = [(each.question, each.answer) for each in islice(sum_problems(2, 2, 1, seed=0), 700)]
    found = controls(problems[:500], problems[500:])
    assert found.constant < 0.05
    assert found.rule < 0.2

"""Worked sums: the working of writers with and without mistakes, and problems with a number of carries."""

from __future__ import annotations

from itertools import islice
from random import Random

import pytest
from pydantic import ValidationError

from lorabench.config.inputs import SumProblems
from lorabench.data.grading import Grader, last_number
from lorabench.data.problems import make_problems
from lorabench.data.reasoning import CAREFUL, Writers, n_carries, sum_problems, written_sum, written_sums


def test_the_working_is_right_or_without_carries():
    for terms, careful, careless in [
        ((47, 85), "7+5=12 4+8+1=13 132", "7+5=12 4+8=12 122"),
        ((42, 15), "2+5=7 4+1=5 57", "2+5=7 4+1=5 57"),
        ((456, 547), "6+7=13 5+4+1=10 4+5+1=10 1003", "6+7=13 5+4=9 4+5=9 993"),
    ]:
        assert written_sum(*terms, CAREFUL, Random(0)) == careful
        assert written_sum(*terms, Writers(careless=1.0, most_slips=0.0), Random(0)) == careless


def test_carries_are_those_into_a_column():
    assert [n_carries(*terms) for terms in ((42, 15), (47, 85), (99, 11), (456, 547), (456, 546))] == [0, 1, 1, 2, 2]
    assert n_carries(540, 540) == 0, "the leftmost column is written whole"


def test_problems_have_carries_and_right_workings():
    problems = list(islice(sum_problems(2, 3, 1, seed=0), 200))
    for problem in problems:
        first, second = map(int, problem.question.split("+"))
        assert int(problem.answer) == first + second == last_number(problem.response)
        assert len(str(first)) == len(str(second))
        assert n_carries(first, second) >= 1
    assert {len(problem.question) for problem in problems} == {5, 7}
    assert problems == list(islice(sum_problems(2, 3, 1, seed=0), 200))


def test_writers_make_the_mistakes_that_they_should():
    def shares(**mix):
        """Return the shares of workings that carry, and that are right, of sums of two columns with a carry."""
        texts = list(islice(written_sums(Writers(**mix, digits=(2,)), seed=0), 4000))
        texts = [text for text in texts if n_carries(*map(int, text.question.split("+")))]
        carried = [text.response.split()[1].count("+") == 2 for text in texts]
        right = [last_number(text.response) == int(text.answer) for text in texts]
        return sum(carried) / len(texts), sum(right) / len(texts)

    assert shares(careless=0.6, most_slips=0.0) == pytest.approx((0.4, 0.4), abs=0.04)
    # A slip to below 10 leaves nothing to carry.
    carried, right = shares(careless=0.0, most_slips=0.6)
    assert 0.9 < carried < 1
    assert right == pytest.approx(0.7**2, abs=0.08)


def test_a_set_of_sums_is_graded_by_the_last_number():
    spec = SumProblems(kind="sums", train=20, validation=4, test=6, min_digits=3, max_digits=3, carries=2)
    rows = make_problems(spec)
    assert [row["split"] for row in rows].count("train") == 20
    grader = Grader(spec.grader)
    row = rows[0]
    assert grader.grade([f"1+2=3 {row['answer']}", row["answer"] + " 1"], [row["answer"]] * 2) == [True, False]


def test_sets_that_can_not_be():
    for sizes, message in [
        ({"min_digits": 4, "max_digits": 3}, "min_digits = 4 is more than max_digits = 3"),
        ({"carries": 2}, "carries = 2: must be below min_digits = 2"),
        ({"min_digits": 1}, "greater than or equal to 2"),
    ]:
        with pytest.raises(ValidationError, match=message):
            SumProblems(kind="sums", train=1, validation=1, test=1, **sizes)

"""Graders, with the real worker processes: right and wrong answers, and answers that must do no harm."""

import os
import signal
import subprocess
import sys
import time
from fractions import Fraction

import pytest

from lorabench.data import grading
from lorabench.data.grading import MAX_CHARS, Grader, last_box, last_number


@pytest.fixture(scope="module")
def math():
    with Grader("math", seconds=1.0) as grader:
        yield grader


def box(content):
    return rf"So the answer is $\boxed{{{content}}}$."


def worker_pid(grader):
    return grader._workers[0]._process.pid


def test_the_last_box_and_the_last_number():
    contents = {
        r"\boxed{1} then \fbox{2}.": "2",
        r"\boxed {\frac{1}{2}} {": r"\frac{1}{2}",
        r"\boxed{\left\{ 1 \right.}": r"\left\{ 1 \right.",
        r"\boxed{\boxed{3}}": "3",
        "\\boxed 12\nis it": "12",
        r"\boxed{1} then \boxed{2": None,
        "\\boxed{a\u2028b}": "a\u2028b",
    }
    assert {text: last_box(text) for text in contents} == contents
    values = {
        "10 - 3": 3,
        "12 and (-3).": -3,
        "so $1,234.50!": Fraction(2469, 2),
        "1,2,3": 3,
        "12,345,67": 67,
        ".5": Fraction(1, 2),
        "none": None,
        "9" * 5000: None,
    }
    assert {text: last_number(text) for text in values} == values


def test_bare_numbers():
    cases = [
        ("arithmetic", "12", True, ["12", " 12\n", "12.0", "+12", "012"]),
        ("arithmetic", "12", False, ["12.0000001", "-12", "= 12", "12 12", "12.", "6+6", "", "\x00\ud800"]),
        ("arithmetic", "12", False, ["1e1000000000", "9" * 1_000_000]),
        ("gsm_symbolic", "1234", True, ["2 * 617 = 1234 apples\n#### 1234", "so he pays $1,234.00."]),
        ("gsm_symbolic", "1234", False, ["1234 and then 5", "-1234", "#### 1234.5", "nothing", "1," * 500_000]),
    ]
    for kind, answer, verdict, responses in cases:
        assert Grader(kind).grade(responses, [answer] * len(responses)) == [verdict] * len(responses)


def test_equal_answers_and_those_that_differ(math):
    equal = [
        (r"\dfrac12", r"\frac{1}{2}"),
        (r"(x+1)^2", "x^2+2x+1"),
        ("2, 1", "1,2"),
        (r"[1,2)\cup(3,\infty)", r"(3, \infty) \cup [1, 2)"),
        ("x=5", "5"),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix} 1 \\ \frac{4}{2} \end{pmatrix}"),
        (r"\text{(A)}", "A"),
        (r"5\text{ cm}", "5"),
        (r"\int_0^1 x^2\,dx", r"\frac13"),
        ("5!", "120"),
    ]
    different = [
        ("0.333", r"\frac13"),
        ("(1,2)", "[1,2]"),
        ("x", "5"),
        (r"5 \text{ or } 6", "5"),
        ("", "0"),
        (r"\frac{1}{0}", "1"),
        (r"\text{" + "a" * MAX_CHARS + "}", "a"),
    ]
    for pairs, verdict in ((equal, True), (different, False)):
        for response, answer in pairs:
            assert math.grade([box(response)], [answer]) == [verdict], (response, answer)
    contents = ["1,234", "1{,}234", r"\$1,234", "$1234$", "1234.00", r"1234\text{ dollars}", "01234", "1235"]
    assert math.grade([box(content) for content in contents], ["1234"] * 8) == [True] * 7 + [False]
    assert math.grade([box(1) + box(2), box(2) + box(1), "2"], ["2"] * 3) == [True, False, False]


HARMFUL = (
    "9**9**9**9",
    "10000000!",
    r"\prod_{k=1}^{1000000000} k",
    "1e9999999999",
    "[" * 1_000_000,
    "(" * 450 + "1" + ")" * 450,
    r"\frac" * 190,
    "\uff11\uff12\U0001f916\u202e\u2028\xe9",
    'true\ntrue\n["1", "1"]\n',
    "__import__('os').system('touch {file}')",
    r"\operatorname{eval}(\text{__import__('os').system('touch {file}')})",
    r"\text{open('{file}','w').write}(1)",
)


@pytest.mark.slow
def test_harmful_answers_are_wrong_and_do_nothing(tmp_path):
    file = tmp_path / "file"
    responses = [box(content.replace("{file}", str(file))) for content in HARMFUL]
    good = [box(rf"\frac{{{n}}}{{{2 * n}}}") for n in range(1, len(responses) + 1)]
    mixed = [response for pair in zip(responses, good, strict=True) for response in pair]
    start = time.monotonic()
    with Grader("math", workers=2, seconds=0.5) as grader:
        verdicts = grader.grade(mixed, ["0.5"] * len(mixed))
    assert verdicts == [False, True] * len(good)
    assert not file.exists()
    assert time.monotonic() - start < 30, "a limit on time does not hold"


def test_a_worker_that_dies_is_replaced(math):
    assert math.grade([box("1/2")], ["0.5"]) == [True]
    first = worker_pid(math)
    os.kill(first, signal.SIGKILL)
    os.waitid(os.P_PID, first, os.WEXITED | os.WNOWAIT)
    responses = [box("1/2"), box("9^{9^{9^9}}"), box("1/4")]
    assert math.grade(responses, ["0.5", "2", "0.25"]) == [True, False, True]
    assert worker_pid(math) != first


@pytest.mark.slow
def test_a_worker_that_stops_is_replaced_and_workers_end_with_the_grader(monkeypatch):
    with Grader("math", seconds=1.0) as grader:
        assert grader.grade([box("1/2")], ["0.5"]) == [True]
        os.kill(worker_pid(grader), signal.SIGSTOP)
        monkeypatch.setattr(grading, "_WALL_PER_CPU_SECOND", 0.5)
        assert grader.grade([box("1/3")], [r"\frac{2}{6}"]) == [False]
        monkeypatch.undo()
        assert grader.grade([box("1/3")], [r"\frac{2}{6}"]) == [True]
        process = grader._workers[0]._process
    assert process.returncode == -signal.SIGKILL


def test_a_worker_that_does_not_start_is_no_wrong_answer(monkeypatch, tmp_path):
    broken = tmp_path / "worker.py"
    broken.write_text("import no_such_module")
    monkeypatch.setattr(grading, "_WORKER", broken)
    with Grader("math") as grader, pytest.raises(RuntimeError, match="did not start"):
        grader.grade([box("1/2")], ["0.5"])


@pytest.mark.slow
def test_a_confined_process_neither_writes_files_nor_takes_much_memory(tmp_path):
    tries = {"pathlib.Path('file').write_text('text')": "OSError", "bytearray(2**31)": "MemoryError"}
    script = f"import pathlib, runpy\nworker = runpy.run_path({str(grading._WORKER)!r})\nworker['confine']()\n"
    script += "assert worker['equal']('1/2', '0.5')\n"
    for harm in tries:
        script += f"try:\n    {harm}\n    print('done')\nexcept Exception as error:\n    print(type(error).__name__)\n"
    command = [sys.executable, "-u", "-c", script]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == list(tries.values())
    assert not (tmp_path / "file").exists() or not (tmp_path / "file").read_text()


def test_words_of_reflection():
    for response in ("12. Wait, it is 3.", "wait no", "Hmmm, 12?", "Let\u2019s verify: 12.", "Alternatively, 3."):
        assert grading.reflects(response), response
    for response in ("", "They wait 5 minutes, the waiter waited.", "He checks his bag.", "An alternative is right."):
        assert not grading.reflects(response), response

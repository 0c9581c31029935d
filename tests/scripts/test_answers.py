"""The sentences and the picture that answer plain questions, from matrices that are made for one answer each."""

from typing import Any

import pandas as pd

from answers import QUESTIONS, answer
from lorabench.figures.evidence import QUESTIONS as DRAWN
from lorabench.figures.evidence import draw_matrix
from lorabench.report.claim_text import VERDICTS

QUESTION = {question.claim_id: question for question in QUESTIONS}
GROWS = "the gap grows by 0.050 nats [0.040, 0.060]"
MARGIN = "2% of what full fine-tuning gains, at most 10% of its loss"
ASKED = f"Do large batches harm LoRA more than full fine-tuning? (Margin: {MARGIN}.)"
SIZES = {"tiny": 3e5, "0.13B": 1.3e8, "1B": 1e9, "3B": 3e9, "8B": 8e9}


def cell(verdict: str, scale: str = "tiny", **columns: Any) -> dict[str, Any]:
    """Make a cell of the matrix with one comparison, whose numbers are those of claim D1."""
    found = {"claim_id": "D1", "scale": scale, "parameters": SIZES[scale], "unit": "nats per token", "verdict": verdict}
    found |= {"explored": True, "held_out": None, "p_again": None, "source": None}
    found |= {"batches": None, "batches_alike": None, "others": ""}
    found |= {"n_parts": 1, "part_low": 0.05, "part_high": 0.05}
    return found | {"estimate": 0.05, "ci_low": 0.04, "ci_high": 0.06} | columns


def batches(*cells: dict[str, Any]) -> str:
    return answer(QUESTION["D1"], pd.DataFrame(cells))


def test_answers_are_grouped_and_the_largest_models_with_a_decision_say_what_to_do():
    cells = [
        cell("not seen here", p_again=0.79, held_out="not seen here"),
        cell("confirmed", "1B", p_again=0.8, held_out="inconclusive", n_parts=2, part_low=0.01, part_high=0.07),
        cell("contradicted", "3B", unit="error rate"),
        cell("confirmed", "8B", estimate=None, held_out="not tested"),
    ]
    text = batches(*reversed(cells), cell("setting not met", "0.13B"))
    assert text == (
        f"**Keep batches small.** {ASKED} *No* on tiny models ({GROWS}; borderline, but the same on held-out seeds) "
        "and at 3B. *Yes* at 1B (the gap grows by 0.010 to 0.070 nats; undecided on held-out seeds) "
        "and at 8B (not tested on held-out seeds)."
    )
    # What is open has a number only with its interval, which is that of one comparison.
    open_ones = [
        cell("inconclusive", n_parts=2, part_low=0.01, part_high=0.07),
        cell("inconclusive", "1B", ci_low=None),
    ]
    assert batches(*open_ones).endswith(f"*Undecided* on tiny models (so far {GROWS}) and at 1B.")
    # One that decides alone is named where another leaves the question open.
    alone = cell("inconclusive", others="a: confirmed; b: confirmed; a: confirmed; c: not seen here; d: inconclusive")
    assert batches(alone).endswith(f"(so far {GROWS}; yes in a and b alone; no in c alone).")
    # Without explored seeds a verdict did not come out again.
    once = cell("confirmed", p_again=0.26, held_out="confirmed", explored=False)
    assert batches(once).endswith(f" *Yes* on tiny models ({GROWS}; borderline, all seeds held out).")
    together = once | {"p_again": 0.9, "batches": 3, "batches_alike": 2}
    assert batches(together).endswith(f" *Yes* on tiny models ({GROWS}; in 2 of 3 batches of new seeds).")


def test_an_answer_has_those_of_the_questions_beside_it():
    cells = [cell("confirmed", claim_id="F1"), cell("contradicted", "1B", claim_id="F3")]
    text = answer(QUESTION["F1"], pd.DataFrame(cells))
    assert text.startswith("**In reinforcement learning, begin with a low rank.** Does rank 1")
    assert "*Yes* on tiny models. Do all ranks and full fine-tuning gain reward" in text
    assert text.endswith("(Margin: 2% of the problems.) *No* at 1B.")


def test_the_picture_says_the_answers_of_sizes_that_are_drawn_together():
    assert [question.claim_id for question in QUESTIONS] == list(DRAWN)
    # Of two sizes the one that is nearer to failing decides.
    cells = [cell(verdict) | {"claim_id": q.claim_id} for q, verdict in zip(QUESTIONS, VERDICTS, strict=False)]
    cells += [cell("confirmed", "1B", source="a"), cell("contradicted", "3B"), cell("not tested", "8B")]
    texts = [text.get_text() for text in draw_matrix(pd.DataFrame(cells)).axes[0].texts]
    heads = [text for text in texts if text.endswith(("us", "others", "both"))]
    assert heads == ["tiny\nus", "1\N{EN DASH}3B\nboth", "8B\nus"]
    key = {"yes": 3, "?": 1, "\N{EN DASH}": 1}
    # Without a question, and without runs in the setting, there is a dash.
    shown = {"yes": 1, "slight": 1, "no": 3, "?": 1, "\N{EN DASH}": 3 * len(QUESTIONS) - 6}
    assert {word: texts.count(word) - key.get(word, 0) for word in shown} == shown

"""Published numbers are those of the files."""

from lorabench.analysis import published
from lorabench.claims.judge import CLAIMS


def test_numbers_are_those_of_the_files():
    estimates = published.estimates_by_claim()
    assert estimates["B1"].startswith("10 (Qwen3-4B")
    assert estimates["B4"].startswith("0.48 (")
    assert estimates["A7"].startswith("0.0000 nats")
    assert estimates["E2"].startswith("0.0034 nats")
    # The ratio of the vertices of the parabolas through the minima: 5.012e-4 / 3.001e-4.
    assert estimates["B3"].startswith("1.67 from rank 4 to 128 (Llama-3.1-8B")
    assert set(estimates) <= {claim.id for claim in CLAIMS}

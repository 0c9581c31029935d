"""Published numbers beside the claims: computed from the reference files, absent where those are."""

from __future__ import annotations

from lorabench import published
from lorabench.analysis.claims import CLAIMS


def test_numbers_are_those_of_the_files():
    found = published.beside_claims()
    assert found["B1"].startswith("10 (Qwen3-4B")
    assert found["B4"].startswith("0.48 (")
    assert found["A7"].startswith("0.0000 nats")
    assert found["E2"].startswith("0.0034 nats")
    # Vertices of the parabolas around each minimum: 5.012e-4 / 3.001e-4.
    assert found["B3"].startswith("1.67 from rank 4 to 128 (Llama-3.1-8B")
    assert set(found) <= {claim.id for claim in CLAIMS}


def test_without_the_files_there_is_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(published, "REFERENCE", tmp_path)
    assert published.beside_claims() == {}
    assert published.numbers() == {}
    assert published.sweeps().empty

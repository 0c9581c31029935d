"""A change in what a run computes must change its id; a comment or a docstring must not.

PROTOCOL_VERSION is part of every run_id. This test keeps a digest of the code that determines a run's numbers, without
comments and docstrings. When it fails, the change either alters results, and PROTOCOL_VERSION in lorabench/runs.py must
be raised, or it does not, and the parity tests in tests/training and tests/models still pass. In both cases the new
line, which the failure shows, goes into tests/protocol_digest.txt.
"""

import ast
import hashlib
import sys
from pathlib import Path

import pytest

from lorabench.runs import PROTOCOL_VERSION

from .conftest import REPOSITORY

CODE = (
    "lorabench/data/chat.py",
    "lorabench/data/files.py",
    "lorabench/data/grading.py",
    "lorabench/data/grading_worker.py",
    "lorabench/data/problems.py",
    "lorabench/data/reasoning.py",
    "lorabench/data/sft.py",
    "lorabench/data/tokens.py",
    "lorabench/models/attention.py",
    "lorabench/models/bf16_products.py",
    "lorabench/models/fused.py",
    "lorabench/models/passes.py",
    "lorabench/models/lora.py",
    "lorabench/config/fields.py",
    "lorabench/training/distributed.py",
    "lorabench/training/loss.py",
    "lorabench/training/rl/loop.py",
    "lorabench/training/rl/objective.py",
    "lorabench/training/rl/sampler.py",
    "lorabench/training/run.py",
    "lorabench/training/sft.py",
)
RECORDED = Path(__file__).parent / "protocol_digest.txt"


def code_digest(source: str) -> str:
    """Return the digest of the code without comments, docstrings and the docstrings of attributes."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            node.body = [statement for statement in node.body if not is_docstring(statement)] or [ast.Pass()]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()


def is_docstring(statement: ast.stmt) -> bool:
    match statement:
        case ast.Expr(ast.Constant(str())):
            return True
    return False


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="newer Pythons print syntax trees otherwise")
def test_the_recorded_digest_is_that_of_the_code():
    digests = [code_digest((REPOSITORY / path).read_text()) for path in CODE]
    now = f"{PROTOCOL_VERSION} {hashlib.sha256(' '.join(digests).encode()).hexdigest()[:16]}\n"
    assert RECORDED.read_text() == now, f"what a run computes may have changed; see {__file__}; now: {now}"


def test_comments_and_docstrings_do_not_count():
    plain = "def f(x):\n    return x + 1\n"
    assert code_digest(plain) == code_digest('"""Doc."""\ndef f(x):  # why\n    """Doc."""\n    return x + 1\n')
    assert code_digest(plain) != code_digest(plain.replace("1", "2"))

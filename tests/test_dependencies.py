"""What the package imports is installed with it, also without the extras that the tests need."""

import ast
import re
import sys
from importlib.metadata import packages_distributions, requires

from .conftest import REPOSITORY

# What dependencies bring along (lm-eval's extra `ifeval`, math-verify), and what users install themselves.
BROUGHT = {"langdetect", "nltk", "sympy", "tensorboard", "vllm"}

OWN = {"lorabench", "lora_advice", "advice", "studies", "benchmarks"}


def test_every_imported_package_is_a_dependency():
    imported = set()
    for path in (path for folder in ("lorabench", "studies") for path in (REPOSITORY / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                imported.add(node.module)
    top = {name.split(".")[0] for name in imported} - set(sys.stdlib_module_names) - OWN
    assert {"torch", "peft"} <= top
    declared = {
        re.split(r"[^\w.-]", line)[0].lower().replace("_", "-")
        for line in requires("lorabench") or []
        if "extra ==" not in line
    }
    provides = packages_distributions()
    missing = {name for name in top if not declared & {one.lower().replace("_", "-") for one in provides.get(name, [])}}
    assert missing == BROUGHT & top

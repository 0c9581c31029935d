"""What claims say: their texts, which a YAML file beside the module of their judges has, under the module's name.

Its `claims` have the fields of `Claim` that are no code. A name in braces is a constant of the module, or of another
one (`{rewards.LEAD:g}`), or a text in the file's `shared` or in `shared.yaml` (`{sweep}`).
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

from lorabench.analysis import arms, curves, lr_law, memorisation, optima, rewards
from lorabench.analysis.finding import MIN_SEEDS
from lorabench.claims import scope
from lorabench.claims.claim import JUDGES, Claim
from lorabench.config import fields
from lorabench.utils.yaml_files import read_yaml

_MODULES = (arms, curves, fields, lr_law, memorisation, optima, rewards, scope)

_COMMON = {"MIN_SEEDS": MIN_SEEDS, **{module.__name__.rpartition(".")[2]: module for module in _MODULES}}

_SHARED = read_yaml(Path(__file__).with_name("shared.yaml"))


def claims_of(module: ModuleType) -> list[Claim]:
    """Return the claims that a module judges, in the order of its YAML file; a ValueError says if one has a text but no
    judge, or a judge but no text, or if a field or a name in a text is unknown."""
    path = Path(str(module.__file__)).with_suffix(".yaml")
    texts, judges = read_yaml(path), JUDGES[module.__name__]
    if alone := sorted(judges.keys() ^ texts["claims"].keys()):
        raise ValueError(f"{path}: not with both a text here and a judge in {path.stem}.py: {', '.join(alone)}")
    names = _COMMON | vars(module)

    def filled(value: Any) -> Any:
        if isinstance(value, list):
            return tuple(value)
        return value.format_map(names) if isinstance(value, str) else value

    claims = []
    try:
        for about, text in (_SHARED | texts.get("shared", {})).items():
            names[about] = filled(text)
        for about, own in texts["claims"].items():
            claims.append(Claim(about, **{name: filled(value) for name, value in own.items()}, **judges[about]))
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: {about}: {error!r}") from error
    return claims

"""Studies: research on top of the suite, which brings presets, claims and figures of its own.

The distribution names the package of each study as an entry point of the group `lorabench.studies`. So only what is
installed is a study: no preset, and no file beside one, makes code run. Of a study's package the suite reads

- `presets/`: presets, and below it suites, that are found by their names as the shipped ones;
- `study.yaml`: `families` and `claims` as in lorabench/figures/claim_names.yaml, `shared` and `figures` as in
  lorabench/figures/captions.yaml, `section` as one of lorabench/report/sections.yaml, and `controls`, the presets that
  are no evidence on the paper's claims;

and it imports, where it needs them,

- `claims`, whose import declares the study's claims, with their texts in `claims.yaml`;
- the modules that draw the figures;
- `predictions`, if there is one: a pydantic model `Predictions` of what a preset may state for the study in the section
  `predictions`, and `DEFAULT`, which holds without a preset.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from importlib import import_module
from importlib.metadata import distribution
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from lorabench.errors import UserError
from lorabench.utils.yaml_files import read_yaml


@dataclass(frozen=True)
class Study:
    """A study by its name and its package."""

    name: str
    package: str

    @cached_property
    def folder(self) -> Path:
        """The folder of the package, which is found without running its code."""
        spec = find_spec(self.package)
        if spec is None or spec.origin is None:
            raise UserError(f"study {self.name!r}: its package {self.package} is not installed")
        return Path(spec.origin).parent

    @cached_property
    def texts(self) -> Any:
        """The content of `study.yaml`, a mapping."""
        return read_yaml(self.folder / "study.yaml")

    @property
    def predicts(self) -> bool:
        """Whether presets may state predictions for this study."""
        return (self.folder / "predictions.py").is_file()

    def module(self, name: str) -> ModuleType:
        """Import a module of the study."""
        return import_module(f"{self.package}.{name}")


@cache
def studies() -> tuple[Study, ...]:
    """Return the installed studies by name."""
    points = distribution("lorabench").entry_points.select(group="lorabench.studies")
    return tuple(sorted((Study(point.name, point.value) for point in points), key=lambda study: study.name))

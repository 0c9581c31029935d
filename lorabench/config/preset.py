"""The whole preset: one YAML file of models, data, protocol and experiments, validated by pydantic; and its schema."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import product
from typing import Annotated, Any, Self

from pydantic import AfterValidator, model_validator
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue

from lorabench.config.execution import EVAL_SOURCES, Evaluation, Execution
from lorabench.config.experiments import Experiments, Protocol, Racing, RlExperiment, SftExperiment
from lorabench.config.fields import Name, NotNegative, Strict
from lorabench.config.inputs import (
    DatasetSpec,
    FactsDataset,
    GeneratedSplits,
    ModelSpec,
    ProblemSpec,
    model_catalogue,
)
from lorabench.config.margins import Margins, checked_predictions


class Preset(Strict):
    """The models, data, training protocol and experiments that are run, and the machine that runs them."""

    description: str
    """One sentence for the report."""
    limits: list[str] = []
    """What this preset cannot test, for the report; a sentence or two each."""
    models: dict[Name, ModelSpec] = {}
    """Models of your own, by name; experiments may also name those of the catalogue, workflow/models.yaml."""
    datasets: dict[Name, DatasetSpec] = {}
    """Datasets for SFT, by name."""
    problems: dict[Name, ProblemSpec] = {}
    """Problem sets for RL, by name."""
    protocol: Protocol = Protocol()
    margins: Margins
    """The smallest effects that matter, written down before the runs; verdicts on claims are judged by them."""
    predictions: Annotated[dict[str, Any], AfterValidator(checked_predictions)] | None = None
    """What studies predict, by study, written down before the runs and judged like claims; null for no predictions."""
    first_seed: NotNegative = 0
    """The first seed of every sweep: 100 gives the seeds 100, 101, and so on. Wherever examples are generated, another
    first seed than 0 also gives other test examples."""
    racing: Racing | None = None
    """When an LR next to the best gets no more seeds; null to give all three the same."""
    experiments: Experiments
    evaluation: Evaluation | None = None
    """Evaluation with lm-eval; null for none."""
    execution: Execution

    @model_validator(mode="after")
    def _can_be_planned(self) -> Self:
        if not self.experiments.trained():
            trains = ", ".join(name for name in Experiments.model_fields if name != "compute")
            raise ValueError(f"experiments: none of them trains; needed is one of {trains}")
        if twice := self.datasets.keys() & self.problems.keys():
            raise ValueError(f"problems: {min(twice)!r} is also the name of a dataset; choose another name")
        models = {**self.models, **model_catalogue()}
        if self.experiments.compute:
            _known(self.experiments.compute.models, models, "experiments.compute.models")
        for name, blocks in self.experiments.trained().items():
            for number, block in enumerate(blocks):
                where = f"experiments.{name}.{number}"
                _known(block.models, models, f"{where}.models")
                if isinstance(block, SftExperiment):
                    self._check_sft(block, where)
                elif isinstance(block, RlExperiment):
                    self._check_rl(block, where)
        if self.evaluation:
            self._check_evaluation(self.evaluation)
        return self

    @model_validator(mode="after")
    def _other_test_examples(self) -> Self:
        """Return the preset with other test examples than those of the first seed 0, wherever they are generated and
        there are enough."""

        def changed(spec: Any) -> Any:
            if isinstance(spec, FactsDataset):
                return spec.model_copy(update={"seed": spec.seed + self.first_seed})
            if isinstance(spec, GeneratedSplits) and spec.test_seed is None and spec.has_other_tests():
                return spec.model_copy(update={"test_seed": self.first_seed})
            return spec

        if not self.first_seed:
            return self
        datasets = {name: changed(spec) for name, spec in self.datasets.items()}
        problems = {name: changed(spec) for name, spec in self.problems.items()}
        return self.model_copy(update={"datasets": datasets, "problems": problems})

    def _check_sft(self, block: SftExperiment, where: str) -> None:
        _known(block.datasets, self.datasets, f"{where}.datasets")
        for dataset, batch_size in product(block.datasets, block.batch_sizes):
            train = self.datasets[dataset].train
            if train * block.epochs < batch_size:
                raise ValueError(
                    f"{where}.batch_sizes: {batch_size} is more than the {train} training examples of {dataset!r}"
                )

    def _check_rl(self, block: RlExperiment, where: str) -> None:
        _known([*block.problems, *block.held_out], self.problems, f"{where}.problems")
        for name in block.problems:
            train = self.problems[name].train
            if train < block.problems_per_step:
                raise ValueError(
                    f"{where}.problems_per_step: {block.problems_per_step} is more than the {train} training problems "
                    f"of {name!r}"
                )
        # Held-out sets are called by their names in tables, beside the splits.
        if wrong := {*block.problems, "train", "validation", "test"} & set(block.held_out):
            raise ValueError(f"{where}.held_out: {min(wrong)!r} is trained on, or is the name of a split")

    def _check_evaluation(self, evaluation: Evaluation) -> None:
        _known(evaluation.experiments, self.experiments.trained(), "evaluation.experiments")
        names = [task.name for task in evaluation.tasks]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"evaluation.tasks: {twice[0]!r} appears twice")
        for number, task in enumerate(evaluation.tasks):
            where = f"evaluation.tasks.{number}"
            if task.name.startswith("lorabench_"):
                _known([task.name], EVAL_SOURCES, f"{where}.name")
            kind = EVAL_SOURCES.get(task.name)
            allowed = [name for name, spec in self.sources.items() if spec.kind == kind] if kind else [None]
            if task.source not in allowed:
                sources = ", ".join(map(str, allowed)) or f"a source of kind {kind}, of which the preset has none"
                raise ValueError(f"{where}.source = {task.source!r}: allowed for {task.name}: {sources}")

    @property
    def sources(self) -> dict[str, DatasetSpec | ProblemSpec]:
        """The datasets and problem sets by name."""
        return {**self.datasets, **self.problems}

    def with_execution(self, **changes: Any) -> Self:
        """Return the preset with other settings of `execution`, which are not validated."""
        return self.model_copy(update={"execution": self.execution.model_copy(update=changes)})


def _known(wanted: list[str], known: Mapping[str, object], where: str) -> None:
    for name in wanted:
        if name not in known:
            raise ValueError(f"{where}: unknown name {name!r}; allowed: {', '.join(known)}")


def json_schema() -> str:
    """Return the JSON schema of a preset's file, as shipped beside the presets for editors.

    It requires no field, because a file may extend another that has it; `load_preset` says what is missing.
    """
    schema = Preset.model_json_schema(schema_generator=_PartialSchema)
    defs = schema["$defs"]
    tasks = defs["Evaluation"]["properties"]["tasks"]
    tasks["anyOf"] = [{key: tasks.pop(key) for key in ("items", "minItems", "type")}]
    for lists in (*defs["Experiments"]["properties"].values(), tasks):
        if lists["anyOf"][0].get("type") == "array":
            # A mapping by name stands for a list; null removes what another preset has.
            by_name = {"anyOf": [lists["anyOf"][0]["items"], {"type": "null"}]}
            lists["anyOf"].insert(1, {"additionalProperties": by_name, "type": "object"})
    extends = {
        "anyOf": [{"type": "string"}, {"items": {"type": "string"}, "type": "array"}],
        "description": "Presets or suites, by shipped name or path, whose fields this file changes or adds to.",
    }
    schema["properties"] = {"extends": extends} | schema["properties"]
    return json.dumps(schema, indent=2) + "\n"


class _PartialSchema(GenerateJsonSchema):
    """A JSON schema without required fields, which a part of a preset satisfies too, even without a `kind`."""

    def field_is_required(self, field: Any, total: bool) -> bool:
        return False

    def tagged_union_schema(self, schema: Any) -> JsonSchemaValue:
        return {"anyOf": super().tagged_union_schema(schema)["oneOf"]}

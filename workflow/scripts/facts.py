"""Write the facts that lora-advice ships, with the SHA-256 of each file in `manifest.json`.

    python workflow/scripts/facts.py ROOT

They are the published evidence on learning rates, the constants of the theories, and what identifies the shipped bases.
Tables that are written by hand, such as `variant_lrs.csv`, are only hashed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from lorabench.analysis.arms import ALPHA
from lorabench.analysis.lr_law import PIVOT, PUBLISHED
from lorabench.claims.learning_rate import SHORT_RATIO
from lorabench.config.inputs import TinyModel, model_catalogue
from lorabench.config.margins import DEFAULT_MARGINS, DEFAULT_PREDICTIONS
from lorabench.models.base import weights_sha256
from lorabench.models.specs import shipped_folder

_COPIED = ("lr_optima.csv", "lr_evidence.json")
# What lora-advice reads of a configuration.
_CONFIG = """
    model_type hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim intermediate_size
    moe_intermediate_size vocab_size max_position_embeddings num_local_experts num_experts_per_tok tie_word_embeddings
""".split()


def write_facts(root: Path) -> None:
    """Write the facts of a repository into `advice/lora_advice/facts`.

    Args:
        root: the repository's root, with the published evidence.
    """
    folder, evidence = root / "advice/lora_advice/facts", root / "paper_figures/published/evidence"
    for name in _COPIED:
        shutil.copyfile(evidence / name, folder / name)
    (folder / "theory.json").write_text(json.dumps(theory(), indent=2) + "\n")
    (folder / "bases.json").write_text(json.dumps(bases(), indent=2) + "\n")
    files = sorted(path for path in folder.iterdir() if path.name != "manifest.json")
    hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    (folder / "manifest.json").write_text(json.dumps(hashes, indent=2) + "\n")


def theory() -> dict[str, Any]:
    """Return the constants of the law, of the theory `movement`, and of the paper."""
    movement = DEFAULT_PREDICTIONS.lr_ratio.movement
    assert movement
    return {
        "law": {
            "base": PUBLISHED.base,
            "multiplier": PUBLISHED.multiplier,
            "exponents": dict(PUBLISHED.exponents),
            "pivot": PIVOT,
        },
        "movement": movement.model_dump(),
        "alpha": ALPHA,
        "lr_factor": DEFAULT_MARGINS.lr_factor,
        "short_ratio": SHORT_RATIO,
    }


def bases() -> dict[str, Any]:
    """Return the shipped bases by name: other names in presets, a part of the configuration, and hashes of weights."""
    known: dict[str, Any] = {}
    for name, fields in model_catalogue().items():
        if fields["kind"] == "tiny":
            spec = TinyModel.model_validate(fields)
            config = json.loads((shipped_folder(spec.name) / "config.json").read_text())
            weights = json.dumps(weights_sha256(spec), sort_keys=True)
            kept = {key: config[key] for key in _CONFIG if key in config}
            base = known.setdefault(spec.name, {"names": [], "weights": weights, "config": kept})
            base["names"] += [name] if name != spec.name else []
    return known


if __name__ == "__main__":
    write_facts(Path(sys.argv[1]))

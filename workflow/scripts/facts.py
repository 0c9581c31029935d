"""Write the facts that lora-advice ships, with the SHA-256 of each file in `manifest.json`.

    python workflow/scripts/facts.py ROOT

They are the published evidence on learning rates, the constants of the theories, and what identifies the shipped bases.
Of the learning rates of variants, the rows of this project are those of its published figures; others are kept.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pandas as pd

from lorabench.analysis.arms import ALPHA
from lorabench.analysis.lr_law import PIVOT, PUBLISHED
from lorabench.claims.learning_rate import SHORT_RATIO
from lorabench.config.inputs import TinyModel, model_catalogue
from lorabench.config.loading import load_preset
from lorabench.config.margins import DEFAULT_MARGINS
from lorabench.models.base import weights_sha256
from lorabench.models.specs import dimensions, shipped_folder
from studies.lr_ratio.predictions import DEFAULT

_COPIED = ("lr_optima.csv", "lr_evidence.json")
# What lora-advice reads of a configuration.
_CONFIG = (
    *("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "intermediate_size", "moe_intermediate_size", "vocab_size"),
    *("max_position_embeddings", "num_local_experts", "num_experts_per_tok", "tie_word_embeddings"),
)


def write_facts(root: Path) -> None:
    """Write the facts of the repository at `root`, which has published evidence, into `advice/lora_advice/facts`."""
    folder, published = root / "advice/lora_advice/facts", root / "paper_figures/published"
    for name in _COPIED:
        shutil.copyfile(published / "evidence" / name, folder / name)
    # The rows of the published runs, on explored and on held-out seeds, and those of others.
    figures = {"variants": published / "variants", "variants@100": published / "variants/held_out"}
    variants, models = pd.read_csv(folder / "variant_lrs.csv", dtype=str), load_preset("variants").models
    rows = []
    for source, place in figures.items():
        figure = pd.read_csv(place / "variants_of_lora.csv")
        chosen = figure[(figure["element"] == "gap") & (figure["variant"] != "fullft") & figure["lr_ratio_low"].notna()]
        for row in chosen.to_dict("records"):
            own = {"variant": row["variant"], "rank": f"{row['rank']:.0f}", "dataset": row["dataset"], "source": source}
            own["width"], own["lr_ratio"] = str(dimensions(models[row["model"]]).hidden), f"{row['lr_ratio']:.3g}"
            rows.append(own)
    variants = pd.concat([pd.DataFrame(rows), variants[~variants["source"].isin(list(figures))]])[variants.columns]
    variants.to_csv(folder / "variant_lrs.csv", index=False)
    assert DEFAULT.movement
    law = {"base": PUBLISHED.base, "multiplier": PUBLISHED.multiplier, "exponents": dict(PUBLISHED.exponents)}
    theory = {
        "law": law | {"pivot": PIVOT},
        "movement": DEFAULT.movement.model_dump(),
        "alpha": ALPHA,
        "lr_factor": DEFAULT_MARGINS.lr_factor,
        "short_ratio": SHORT_RATIO,
    }
    (folder / "theory.json").write_text(json.dumps(theory, indent=2) + "\n")
    known: dict[str, Any] = {}
    for name, fields in model_catalogue().items():
        if fields["kind"] == "tiny":
            spec = TinyModel.model_validate(fields)
            config = json.loads((shipped_folder(spec.name) / "config.json").read_text())
            weights = json.dumps(weights_sha256(spec), sort_keys=True)
            kept = {key: config[key] for key in _CONFIG if key in config}
            base = known.setdefault(spec.name, {"names": [], "weights": weights, "config": kept})
            base["names"] += [name] if name != spec.name else []
    (folder / "bases.json").write_text(json.dumps(known, indent=2) + "\n")
    files = sorted(path for path in folder.iterdir() if path.name != "manifest.json")
    hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    (folder / "manifest.json").write_text(json.dumps(hashes, indent=2) + "\n")


if __name__ == "__main__":
    write_facts(Path(sys.argv[1]))

"""The page's sections in the paper's order: which figures and claims are shown together.

The figure of all verdicts stands at the top of the page; it is in no section. The page shows other figures, and claims,
that no section names in a last section.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Section:
    """A part of the paper: its result there, the figures that show it here, and the claims about it."""

    id: str
    short: str
    """The title in the list of contents."""
    title: str
    paper: str
    """The paper's result, in a sentence."""
    figures: tuple[str, ...]
    claims: tuple[str, ...]


SECTIONS = (
    Section(
        "rank",
        "Fig. 1",
        "Figure 1. Learning curves by rank",
        "High ranks learn as full fine-tuning does; a low rank leaves the shared curve when its capacity is used up.",
        ("fig1_envelopes",),
        ("A1", "A2", "A3", "A4", "A6", "A7", "A8"),
    ),
    Section(
        "learning-rate",
        "Fig. 2",
        "Figure 2. Loss against learning rate",
        "Both methods reach the same loss; the best learning rate of LoRA is ten times as high, at nearly every rank.",
        ("fig2_lr_by_rank",),
        ("B1", "B2", "B3", "B4"),
    ),
    Section(
        "batch-size",
        "Fig. 3",
        "Figure 3. Batch size",
        "At large batch sizes LoRA falls further behind full fine-tuning, at every rank.",
        ("fig3_batch_size",),
        ("D1", "D2", "D3", "D4", "D5"),
    ),
    Section(
        "placement",
        "Fig. 4",
        "Figure 4 and its table. Which layers carry LoRA",
        "LoRA should be applied to all layers, above all to the MLP or the experts; on attention alone it is worse.",
        ("fig4_placement",),
        ("E1", "E2", "E3", "E6", "M1"),
    ),
    Section(
        "placement-elsewhere",
        "Fig. 5",
        "Figure 5. Which layers, on a small dataset and in reinforcement learning",
        "The same holds on a small dataset and in reinforcement learning.",
        ("fig5_placement_small", "fig5_placement_rl"),
        ("E4", "E5", "E7"),
    ),
    Section(
        "reinforcement",
        "Fig. 6",
        "Figure 6. Reinforcement learning against learning rate",
        "LoRA reaches the same accuracy as full fine-tuning, even at rank 1, and over a wider range of learning rates.",
        ("fig6_rl_lr",),
        ("F1", "F2", "B10", "F6", "F7", "F8", "F9"),
    ),
    Section(
        "rl-curves",
        "Fig. 7",
        "Figure 7. Accuracy over reinforcement learning",
        "LoRA of every rank and full fine-tuning progress alike.",
        ("fig7_rl_curves",),
        ("F3",),
    ),
    Section(
        "further-sets",
        "Fig. 8",
        "Figure 8. Further problem sets and the length of responses",
        "They also progress alike on held-out problems; their responses grow alike, with backtracking and checking.",
        ("fig8_aime_and_length",),
        ("F4", "F5"),
    ),
    Section(
        "early-curves",
        "Early",
        "Early curves. The first steps do not depend on rank",
        "At one learning rate the curves of all ranks begin alike, because of the factor 1/r.",
        ("early",),
        ("C1", "C2", "C3"),
    ),
    Section(
        "parametrization-section",
        "Alpha",
        "Parametrization. Two of four hyperparameters are redundant",
        "Only alpha * init_A * LR_B and init_A / LR_A matter, and no other values were better than the standard ones.",
        ("parametrization", "variants"),
        ("C4", "C5", "C6", "C7", "C8", "C9", "C10", "C11"),
    ),
    Section(
        "law",
        "LR law",
        "The optimal learning rate over models",
        "The ratio of about 10 is the same for all models; the optimum itself falls with the width, in each family.",
        ("lr_law",),
        ("B5", "B6", "B7", "B8", "B11"),
    ),
    Section(
        "lr-ratio",
        "LR ratio",
        "Why the ratio of learning rates is what it is",
        "Theories of this project, not claims of the paper: what the ratio depends on, predicted before the runs.",
        ("lr_ratio",),
        ("P1", "P2", "P3", "P4", "P5"),
    ),
    Section(
        "length",
        "Length",
        "Short and long runs",
        "In runs of fewer than 100 steps the best learning rate of LoRA is about 15 times that of full fine-tuning.",
        ("short_run",),
        ("B9",),
    ),
    Section(
        "capacity-section",
        "Capacity",
        "How much an adapter holds",
        "A parameter holds about 2 bits, and text has about 1 bit per token.",
        ("capacity", "memorisation"),
        ("A5", "N1", "N2"),
    ),
    Section(
        "compute-section",
        "Compute",
        "What a step costs",
        "A training step of LoRA takes slightly more than two thirds of the FLOPs of full fine-tuning.",
        ("compute", "loss_by_flops"),
        ("G1", "G2", "G3"),
    ),
    Section(
        "learned-and-forgotten",
        "Learned",
        "What was learned, and what was forgotten",
        "The paper measures only the loss; here, tasks measure what a model has learned and what it has forgotten.",
        ("learned_forgotten",),
        (),
    ),
)

FURTHER = Section("further", "Further", "Further figures and claims", "", (), ())

Shown = dict[str, Any]


def arrange(figures: Sequence[Shown], claims: Sequence[Shown]) -> list[Shown]:
    """Return the sections that have a figure or a claim, each with its figures and claims in order.

    Args:
        figures: what the page shows of each figure, which has a `name`.
        claims: what the page shows of each claim, which has a `claim_id`.

    Returns:
        For each section: `about` (the section), `figures` and `claims`.
    """
    by_name = {figure["name"]: figure for figure in figures}
    by_id = {claim["claim_id"]: claim for claim in claims}
    arranged = []
    for section in SECTIONS:
        its_figures = [by_name.pop(name) for name in section.figures if name in by_name]
        its_claims = [by_id.pop(claim) for claim in section.claims if claim in by_id]
        arranged.append({"about": section, "figures": its_figures, "claims": its_claims})
    arranged.append({"about": FURTHER, "figures": list(by_name.values()), "claims": list(by_id.values())})
    return [section for section in arranged if section["figures"] or section["claims"]]

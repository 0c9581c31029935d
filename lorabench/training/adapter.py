"""Measures of how one optimizer step moves a LoRA adapter.

They need the factors A and B only, never a matrix of the layer's size: with U of few columns and V of few rows,
||U V||_F^2 is the sum over entries of (U^T U) * (V V^T), and the singular values of U are the square roots of the
eigenvalues of U^T U.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lorabench.training.distributed import full_tensor

METRICS = ("a_moved", "update_norm", "b_over_a", "descent")
"""Names of the measures of `AdapterProbe`, in the order in which it returns them."""

_GRAM_NUMBERS = 1 << 23
"""Numbers of the Gram matrices that are decomposed together; 64 MiB."""

Pair = tuple[Tensor, Tensor, float]
"""The factors of a layer, A (r, d_in) and B (d_out, r), and its scaling: W' = W + scaling * B A."""


class AdapterProbe:
    """Measures single optimizer steps of an adapter.

    Call `before_step()` when the batch's gradients are computed and `after_step()` after the update. Construct the
    probe before the first step, and before a checkpoint is loaded, since it remembers the initial A. If gradients are
    clipped before `before_step()`, `descent` is that of the clipped gradient.

    Args:
        pairs: the trained factors of each layer by name, all of one rank, as `lorabench.models.lora.adapter_pairs`
            returns them.
    """

    def __init__(self, pairs: Mapping[str, Pair]) -> None:
        self._pairs = dict(pairs)
        self._initial_a = {name: a.detach().clone() for name, (a, _, _) in self._pairs.items()}
        self._before: dict[str, list[Tensor]] = {}

    def before_step(self) -> None:
        """Copy the factors and gradients that the step will change."""
        for name, (a, b, _) in self._pairs.items():
            gradients = (torch.zeros_like(factor) if factor.grad is None else factor.grad for factor in (a, b))
            self._before[name] = [tensor.detach().clone() for tensor in (a, b, *gradients)]

    @torch.no_grad()
    def after_step(self) -> dict[str, float]:
        """Return the measures of the step since `before_step()`, and release the copies made there.

        Returns:
            The measures by name; an empty dictionary if no layer carries LoRA.

            a_moved: mean over layers of ||A - A0||_F / ||A0||_F.
            update_norm: root of the sum over layers of ||W'_after - W'_before||_F^2.
            b_over_a: share of layers whose B has a larger spectral norm than A.
            descent: -<update of all A and B, gradient>, the first-order fall of the batch's loss in nats.
        """
        if not self._pairs:
            return {}
        layers, larger, grams = [], [], []
        for number, (name, (a, b, scaling)) in enumerate(self._pairs.items(), 1):
            initial_a = full_tensor(self._initial_a[name])
            old_a, old_b, a_grad, b_grad = map(full_tensor, self._before.pop(name))
            a, b = full_tensor(a), full_tensor(b)
            a_step, b_step = (a - old_a).double(), (b - old_b).double()
            descent = -(a_step * a_grad).sum() - (b_step * b_grad).sum()
            # B'A' - BA = (B' - B) A' + B (A' - A).
            left = torch.cat([b_step, old_b.double()], dim=1)
            right = torch.cat([a.double(), a_step], dim=0)
            update = scaling**2 * ((left.T @ left) * (right @ right.T)).sum()
            moved = (a - initial_a).double().norm() / initial_a.double().norm()
            layers.append(torch.stack([moved, update, descent]))
            grams += [a.double() @ a.double().T, b.double().T @ b.double()]
            # A GPU takes as long for one small matrix as for many, so they are decomposed together.
            if len(grams) * grams[0].numel() > _GRAM_NUMBERS or number == len(self._pairs):
                # The decomposition raises on NaN, which a diverging run may contain; other measures then show the NaN.
                largest = torch.linalg.eigvalsh(torch.nan_to_num(torch.stack(grams)))[:, -1]
                larger.append(largest[1::2] > largest[::2])
                grams = []
        # All results are transferred at once. Rounding may leave the squared norm of a step without change below zero.
        moved, update, descent = torch.stack(layers).T
        norm = update.sum().clamp(min=0).sqrt()
        measures = [moved.mean(), norm, torch.cat(larger).double().mean(), descent.sum()]
        return dict(zip(METRICS, torch.stack(measures).tolist(), strict=True))

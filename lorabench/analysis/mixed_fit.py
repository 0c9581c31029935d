"""The mixed model of the losses of a comparison, averaged over what is not known of its noise.

The loss of a run of arm a and seed s at a distance x in ln LR from the arm's optimum is

    loss = cubic_a(x) + u_s + w_s(x) + k_s + v_as + misfit_a(x) + e.

A seed has a level u_s, and an effect w_s(x) that is 0 at the optimum and grows away from it, as a random walk in x
times exp(g x). LoRA arms share both: in every published sweep, what a seed does at a high LR is nearly the same for all
ranks. Full fine-tuning has a level k_s of its own, and its w_s agrees with that of LoRA by a correlation rho, as that
of LoRA on attention alone does. v_as is what an arm alone has of a seed. e is what is left, which grows with exp(g x),
too. The sizes of w, v, k, rho and g are not known, and three seeds hardly tell them. So each is tried at fixed values,
and the fits are averaged: their weights are the probabilities of the values before the runs times the restricted
likelihood of the losses. docs/estimates.md has the sizes that published sweeps show.

Of a curve is known before the runs, in units of the mean curvature: curvatures of arms differ, its asymmetry is about 0
and differs little between arms, and no curve is quite a cubic, which is the misfit that all seeds share at an LR.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import NamedTuple

import numpy as np
from scipy.linalg import helmert, null_space

from lorabench.analysis.estimate import cholesky_root, mixture_of_students
from lorabench.analysis.fit_rows import Bend, FitRows, lowest_point

ASYMMETRY, KINDS_ASYMMETRY, OWN_ASYMMETRY = 0.3, 0.1, 0.05
"""The standard deviations, before the runs, of the asymmetry over the curvature, per unit of ln LR: that of all arms,
and what full fine-tuning, LoRA on attention and other LoRA, and each arm, have besides."""

MISFIT = 0.05
"""The standard deviation, before the runs, of what a curve differs from a cubic, over its curvature times x^2."""

LEAST_ERROR = 1e-3
"""The least standard deviation of e over the mean curvature, so that curves of hardly any noise are not taken at their
word."""

LEAST_SIZE = 0.1
"""The least curvature of an arm over the mean of all by which its asymmetry is scaled."""

NEGLIGIBLE = 1e-3
"""The weight over the largest one up to which a combination of sizes is left out."""

WALK, OWN, FULLFT, SHARE, GROWTH, SPREAD = range(6)
"""The sizes: the standard deviations of w at one unit of ln LR, of v and of k, over that of e; rho; g; and the standard
deviation of an arm's curvature over the mean of all."""

_TRIED = (
    {0.0: 0.15, 0.8: 0.15, 2.0: 0.25, 4.5: 0.25, 10.0: 0.2},
    {0.0: 0.3, 0.4: 0.4, 1.0: 0.2, 2.5: 0.1},
    {0.0: 0.2, 0.6: 0.25, 1.5: 0.25, 4.0: 0.2, 12.0: 0.1},
    {0.0: 0.2, 0.6: 0.25, 0.85: 0.3, 1.0: 0.25},
    {0.0: 0.25, 0.75: 0.5, 1.5: 0.25},
    {0.15: 0.3, 0.4: 0.4, 1.2: 0.3},
)
"""By size, the values that are tried, each with its probability before the runs."""

TYPICAL = np.array([[3.0, 0.5, 1.0, 0.8, 0.75, 0.4]])
"""The sizes with which the optima are found from which distances are measured."""


@cache
def _combinations(labels: frozenset[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return all combinations of sizes that arms may have, (combinations, 6), and their log probabilities; a size that
    makes no difference to them has the smallest of its values."""
    several = len(labels) > 1
    used = True, several, several and "FullFT" in labels, len(set(map(_walk_of, labels))) > 1, True, several
    tried = [values if use else {min(values): 1.0} for use, values in zip(used, _TRIED, strict=True)]
    probabilities = list(product(*(values.values() for values in tried)))
    return np.array(list(product(*tried))), np.log(probabilities).sum(1)


@dataclass(frozen=True)
class MixedFit:
    """Coefficients of a fit, which are linear in the losses: for each arm an intercept, a slope, a curvature; contrasts
    of seeds; and an asymmetry. The distribution of their errors is a mixture of multivariate t distributions."""

    coefficients: np.ndarray
    """Their means over all combinations of sizes, (coefficients,)."""
    places: dict[str, list[int]]
    """By arm, the places of its intercept, slope, curvature and asymmetry among the coefficients."""
    bends: dict[str, Bend]
    order: list[int]
    """The places of the coefficients in the order of the columns below: the first ones are drawn most evenly."""
    weights: np.ndarray
    """The weights of the combinations that are not negligible, (combinations,)."""
    shifts: np.ndarray
    """Their coefficients minus the means, in that order, (combinations, coefficients)."""
    roots: np.ndarray
    """Triangular roots of the covariances of their errors from noise, in that order, (combinations, coefficients,
    coefficients), and below of those from what is known of the curves alone, which no estimated variance scales."""
    known_roots: np.ndarray
    dof: int
    """The degrees of freedom of each of the t distributions."""
    sizes: np.ndarray
    """The mean sizes, (6,)."""
    sigma: float
    """The standard deviation of a run at the optimum, without what its seed does to all arms; the mean over arms."""
    design: np.ndarray
    """(runs, coefficients), each row times the square root of its number of seeds."""
    hat: np.ndarray
    """The mean matrix that makes the coefficients from the losses, (coefficients, runs)."""
    noise: np.ndarray
    """The mean covariance of the runs over the variance of e, (runs, runs)."""

    def draws(self, arm: str, name: str) -> np.ndarray:
        """Return draws of the errors of an arm's coefficients, (N_DRAWS, coefficients of the arm), by a name."""
        chosen = [self.order.index(place) for place in self.places[arm]]
        mixture = self.weights, self.shifts, self.roots
        return mixture_of_students(*mixture, self.dof, name, chosen, self.known_roots)


def fit_mixed(rows: FitRows, known: tuple[float, int] | None = None) -> MixedFit | None:
    """Fit the runs that count; None if they determine no fit.

    Args:
        known: the standard deviation of a run without what its seed does to all arms, and its degrees of freedom, where
            one seed can't tell them.
    """
    labels, parabolas = list(rows.in_arm), rows.weights[:, None] * rows.design([list(rows.in_arm)])
    y, arms, (n, p) = rows.weights * rows.runs["test_loss"], len(labels), parabolas.shape
    if n < p or np.linalg.matrix_rank(parabolas) < p:
        return None
    first = np.linalg.lstsq(parabolas, y, rcond=None)[0]
    curvature, squares = float(first[2 * arms]), float(((y - parabolas @ first) ** 2).sum())
    dof = known[1] if known else n - p
    is_noisy = dof >= 1 and (known[0] if known else squares) > 0
    # Without noise, or where the losses have no minimum, there is one curvature and no asymmetry.
    curvature = max(curvature, 0.0) if is_noisy else 0.0
    places = {label: [2 * arm, 2 * arm + 1, 2 * arms] for arm, label in enumerate(labels)}
    lowest = {label: lowest_point(first[own], rows.ends[label]) for label, own in places.items()}
    bends = {label: Bend(float(position), 1.0) for label, (position, _) in lowest.items()}
    model = _Model(rows, bends, curvature)
    if curvature > 0:
        last = 3 * arms + len(rows.seeds) - 1
        places = {label: [2 * arm, 2 * arm + 1, 2 * arms + arm, last] for arm, label in enumerate(labels)}
        means = model.solve(TYPICAL, model.likelihoods(TYPICAL, known)[0]).coefficients[0]
        for label, own in places.items():
            position, _ = lowest_point(means[own], rows.ends[label], bends[label])
            bends[label] = Bend(float(position), max(float(means[own[2]]) / curvature, LEAST_SIZE))
        model = _Model(rows, bends, curvature)
    sizes, log_weights = _combinations(frozenset(labels))
    variances = np.zeros(len(sizes))
    if is_noisy:
        variances, log_likelihoods = model.likelihoods(sizes, known)
        log_weights = log_weights + log_likelihoods
    weights = np.exp(log_weights - log_weights.max())
    likely = weights > NEGLIGIBLE
    sizes, variances, weights = sizes[likely], variances[likely], weights[likely] / weights[likely].sum()
    solved = model.solve(sizes, variances)
    means = weights @ solved.coefficients
    by_kind = [list(dict.fromkeys(kind)) for kind in zip(*places.values(), strict=True)]
    order = [place for kind in reversed(by_kind) for place in kind]
    rotated = zip(solved.hats, model.rotations, strict=True)
    of_runs = [np.tensordot(np.tensordot(weights, hats, 1), rotation, ((0, 2), (0, 1))) for hats, rotation in rotated]
    noise = [
        np.tensordot(np.where(sizes[:, GROWTH] == growth, weights, 0.0) @ _factors(sizes), parts, 1)
        for growth, parts in model.parts.items()
    ]
    return MixedFit(
        coefficients=means,
        places=places,
        bends=bends if curvature > 0 else {},
        order=order,
        weights=weights,
        shifts=(solved.coefficients - means)[:, order],
        roots=cholesky_root(solved.from_noise[:, order][:, :, order]),
        known_roots=cholesky_root(solved.from_curves[:, order][:, :, order]),
        dof=dof,
        sizes=weights @ sizes,
        sigma=math.sqrt(float(weights @ (variances * _own_variance(sizes, arms)))),
        design=model.design,
        hat=np.sum(of_runs, axis=0) * rows.weights,
        noise=np.sum(noise, axis=0),
    )


def _walk_of(label: str) -> str:
    """Return which arms have the same effect of a seed at a distance from their optima, by an arm's label."""
    return label if label == "FullFT" else "attention" if "attn" in label.split() else "LoRA"


def _own_variance(sizes: np.ndarray, arms: int) -> np.ndarray:
    """Return the variance of a run at the optimum over that of e, without what its seed does to all arms, as the mean
    over arms, (combinations,)."""
    return np.asarray(1 + sizes[:, OWN] ** 2 + sizes[:, FULLFT] ** 2 / arms)


def _factors(sizes: np.ndarray) -> np.ndarray:
    """Return the variances of e, w of arms that share it, w of arms that do not, v and k over that of e,
    (combinations, 5)."""
    walk, own, fullft = (sizes[:, [WALK, OWN, FULLFT]] ** 2).T
    return np.column_stack([np.ones(len(sizes)), walk, walk * sizes[:, SHARE], own, fullft])


def _noise(sizes: np.ndarray, parts: Mapping[float, np.ndarray]) -> np.ndarray:
    """Return covariances over the variance of e, (combinations, rows, rows), from their parts by growth, (5, rows,
    rows) each."""
    factors = _factors(sizes)
    covariances = np.empty((len(sizes), *parts[0.0].shape[1:]))
    for growth, own_parts in parts.items():
        chosen = sizes[:, GROWTH] == growth
        covariances[chosen] = np.tensordot(factors[chosen], own_parts, 1)
    return covariances


class _Solved(NamedTuple):
    """Generalized least squares by combinations of sizes."""

    coefficients: np.ndarray
    """(combinations, coefficients)"""
    from_noise: np.ndarray
    """The covariances of their errors, (combinations, coefficients, coefficients), and below of those from what is
    known of the curves alone."""
    from_curves: np.ndarray
    hats: list[np.ndarray]
    """By rotation, what makes the coefficients from rotated losses, (combinations, seeds, coefficients, rows)."""


def _rotations(runs: np.ndarray) -> list[np.ndarray]:
    """Return matrices, (seeds, rows, runs), whose rows together are an orthonormal basis, so that rows of different
    matrices or seeds are not correlated, and all seeds of a matrix have the same covariance.

    The first holds the means over seeds that have runs of the same arms at the same LRs, the others the contrasts of
    such seeds. So whole seeds make large matrices small.
    """
    of_seeds: dict[tuple[object, ...], list[np.ndarray]] = {}
    for seed in dict.fromkeys(runs["seed"].tolist()):
        own = np.flatnonzero(runs["seed"] == seed)
        own = own[np.lexsort((runs["lr"][own], runs["label"][own].astype(str)))]
        of_seeds.setdefault(tuple(runs[["label", "lr", "n"]][own].tolist()), []).append(own)
    basis, means, contrasts = np.eye(len(runs)), [], []
    for alike in map(np.array, of_seeds.values()):
        means.append(basis[alike].sum(0) / math.sqrt(len(alike)))
        if len(alike) > 1:
            contrasts.append(np.tensordot(helmert(len(alike)), basis[alike], 1))
    return [np.concatenate(means)[None], *contrasts]


class _Model:
    """The covariance of the runs of one fit by combinations of sizes, given the optima and curvatures of the arms."""

    def __init__(self, rows: FitRows, bends: Mapping[str, Bend], curvature: float) -> None:
        labels, arms = rows.runs["label"].tolist(), list(rows.in_arm)
        self.arms, self.curvature, self.y = len(arms), curvature, rows.weights * rows.runs["test_loss"]
        self.parabolas = self.design = rows.weights[:, None] * rows.design([arms])
        if curvature > 0:
            self.design = rows.weights[:, None] * rows.design([[label] for label in arms], bends)
        centres, bent = np.array([bends[label] for label in labels]).T
        x, walks = rows.runs["x"] - centres, np.array([_walk_of(label) for label in labels])
        same_seed, same_arm = (np.equal.outer(each, each) for each in (rows.runs["seed"], np.array(labels)))
        walk = same_seed * np.equal.outer(np.sign(x), np.sign(x)) * np.minimum.outer(abs(x), abs(x))
        shared, both_fullft = np.equal.outer(walks, walks), np.logical_and.outer(walks == "FullFT", walks == "FullFT")
        constant = np.array([same_seed & same_arm, same_seed & both_fullft])
        growing = np.array([np.eye(len(x)), walk * shared, walk * ~shared])
        self.parts = {
            growth: np.concatenate([growing * np.exp(growth * np.add.outer(x, x)), constant])
            for growth in _TRIED[GROWTH]
        }
        # Rows of several seeds are weighted to have the noise of one run, and curves that are as uncertain as its own.
        of_curvature, cubes, misfits = (rows.weights * each for each in (rows.runs["x"] ** 2, bent * x**3, x**2))
        same_lr = same_arm & np.equal.outer(rows.runs["lr"], rows.runs["lr"])
        unshared = (KINDS_ASYMMETRY**2 * shared + OWN_ASYMMETRY**2 * same_arm) * np.outer(cubes, cubes)
        unshared += MISFIT**2 * same_lr * np.outer(misfits, misfits)
        curves = np.array([same_arm * np.outer(of_curvature, of_curvature), np.outer(cubes, cubes), unshared])
        self.curves = curvature**2 * curves * np.array([1.0, ASYMMETRY**2, 1.0])[:, None, None]
        self.rotations = _rotations(rows.runs)
        # Where there is hardly any noise, what is known of the curves would count for nothing.
        self.least = max((LEAST_ERROR * curvature) ** 2, np.finfo(float).tiny)

    def likelihoods(self, sizes: np.ndarray, known: tuple[float, int] | None) -> tuple[np.ndarray, np.ndarray]:
        """Return the variance of e, and the restricted log likelihood over all values of it, (combinations,) each."""
        # The restricted likelihood is that of the sums of losses in which no parabola is left.
        spaces = [null_space(np.hstack(rotation @ self.parabolas).T).T @ rotation for rotation in self.rotations]
        blocks, n = [self._seen_by(space) for space in spaces], sum(len(space) * space.shape[1] for space in spaces)
        squared, results = sum(float((left**2).sum()) for left, _, _ in blocks), []
        # A part of the combinations at a time stays in the processor's cache.
        for some in np.array_split(sizes, math.ceil(len(sizes) / 64)):
            own, of_curves = _own_variance(some, self.arms), np.ones((len(some), 3))
            of_curves[:, 0], noises = some[:, SPREAD] ** 2, [_noise(some, parts) for _, parts, _ in blocks]
            variances = known[0] ** 2 / own if known else np.full(len(some), squared / n / 4)
            # What is known of the curves is in units of the variance, which therefore takes a few passes.
            for _ in range(1 if known else 3):
                squares, logs, assumed = 0.0, 0.0, np.maximum(variances, self.least)[:, None, None]
                for (left, _, curves), noise in zip(blocks, noises, strict=True):
                    # The last rows of the root of a bordered matrix are the borders divided by the root of the matrix.
                    size = left.shape[1]
                    bordered = np.pad(
                        noise + np.tensordot(of_curves, curves, 1) / assumed, [(0, 0), *[(0, len(left))] * 2]
                    )
                    bordered[:, size:, :size] = left
                    bordered[:, size:, size:] = np.eye(len(left)) * (1e12 * squared + np.finfo(float).tiny)
                    root = np.linalg.cholesky(bordered)
                    squares = squares + (root[:, size:, :size] ** 2).sum((1, 2))
                    logs = logs + len(left) * np.log(np.diagonal(root, axis1=1, axis2=2)[:, :size]).sum(1)
                # Losses that lie on a parabola leave nothing.
                variances = variances if known else np.maximum(squares / n, np.finfo(float).tiny)
            likelihoods = -logs - n / 2 * np.log(variances)
            if known:
                likelihoods -= (known[1] + n) / 2 * np.log1p(squares / variances / known[1])
            results.append((variances, likelihoods))
        of_variance, of_likelihood = zip(*results, strict=True)
        return np.concatenate(of_variance), np.concatenate(of_likelihood)

    def _seen_by(self, rotation: np.ndarray) -> tuple[np.ndarray, dict[float, np.ndarray], np.ndarray]:
        """Return the losses by a rotation, (seeds, rows), and parts of the covariance of the rows of each seed."""
        basis = rotation[0]
        parts = {growth: basis @ part @ basis.T for growth, part in self.parts.items()}
        return rotation @ self.y, parts, basis @ self.curves @ basis.T

    def solve(self, sizes: np.ndarray, variances: np.ndarray) -> _Solved:
        """Fit the coefficients with given variances of e."""
        p, assumed = self.design.shape[1], np.maximum(variances, self.least)[:, None, None]
        precision, blocks = np.zeros((len(sizes), p, p)), []
        if self.curvature > 0:
            own, differences = slice(2 * self.arms, 3 * self.arms), np.eye(self.arms) - 1 / self.arms
            precision[:, own, own] = assumed * differences / (sizes[:, SPREAD, None, None] * self.curvature) ** 2
            precision[:, -1, -1] = assumed[:, 0, 0] / (ASYMMETRY * self.curvature) ** 2
        information = precision
        for rotation in self.rotations:
            losses, parts, of_curves = self._seen_by(rotation)
            noise, curves = _noise(sizes, parts)[:, None], (of_curves[2] / assumed)[:, None]
            weighted = np.linalg.solve(noise + curves, rotation @ self.design).swapaxes(2, 3)
            information = information + (weighted @ (rotation @ self.design)).sum(1)
            blocks.append((weighted, losses, noise, curves))
        inverse = np.linalg.inv(information)
        hats = [inverse[:, None] @ weighted for weighted, *_ in blocks]
        solved = [
            (np.einsum("ckpd,kd->cp", hat, losses), *((hat @ part @ hat.swapaxes(2, 3)).sum(1) for part in covariances))
            for hat, (_, losses, *covariances) in zip(hats, blocks, strict=True)
        ]
        coefficients, from_noise, from_curves = (np.sum(part, axis=0) for part in zip(*solved, strict=True))
        from_noise, from_curves = assumed * from_noise, assumed * (from_curves + inverse @ precision @ inverse)
        # A coefficient that one of both moves by rounding alone has no correlations by it, so each has a negligible
        # share of the other.
        from_noise, from_curves = from_noise + 1e-9 * from_curves, from_curves + 1e-9 * from_noise
        return _Solved(coefficients, from_noise, from_curves, hats)

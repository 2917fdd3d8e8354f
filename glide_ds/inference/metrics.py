"""How far drawn pictures are from real ones, by features of an image encoder.

N pictures, D width of their features: CLIP's, float32 [N, D] of unit length. Row i of the drawn ones belongs to the
caption of row i of the real ones.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from glide_ds.errors import ConfigError

NEIGHBOURS = 5  # of the k-NN figures, as in arXiv 2002.09797
SUBSETS, SUBSET = 100, 1000  # of KID
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0  # arXiv 2401.09603, and its published code
HALVES = 50  # of the samples, by which differences are judged
LEAST = 4 * NEIGHBOURS  # samples: with fewer the neighbours of a picture are most of them


@dataclass(frozen=True)
class Quality:
    """Drawn pictures against real ones. Distances are 0 for equal distributions, the other figures are shares."""

    frechet_distance: float
    kid: float  # unbiased, so it may be below 0
    kid_spread: float  # standard deviation over subsets
    cmmd: float
    clip_score: float  # of drawn pictures and captions, 100 times the cosine
    clip_score_real: float  # of the real pairs
    precision: float
    recall: float
    density: float
    coverage: float

    def __str__(self) -> str:
        return (
            f"FD {self.frechet_distance:.4f}, KID {self.kid:.3g} ± {self.kid_spread:.2g}, CMMD {self.cmmd:.4f}, CLIP "
            f"score {self.clip_score:.2f} (real {self.clip_score_real:.2f}), precision {self.precision:.3f}, recall "
            f"{self.recall:.3f}, density {self.density:.3f}, coverage {self.coverage:.3f}"
        )


def quality(real: Tensor, drawn: Tensor, texts: Tensor) -> Quality:
    """All figures of drawn pictures; `texts` [N, D] are the captions' embeddings.

    Raises ConfigError where torchmetrics is not installed.
    """
    kid, spread = kernel_distance(real, drawn)
    return Quality(
        frechet_distance=frechet_distance(real, drawn),
        kid=kid,
        kid_spread=spread,
        cmmd=cmmd(real, drawn),
        clip_score=clip_score(drawn, texts),
        clip_score_real=clip_score(real, texts),
        **neighbourhoods(real, drawn),
    )


def frechet_distance(real: Tensor, drawn: Tensor) -> float:
    """Between normal distributions of the features' means and covariances (Heusel et al. 2017, arXiv 1706.08500)."""
    metric = _torchmetrics("fid").FrechetInceptionDistance(feature=_Given(real.shape[1]))
    metric.update(real.double(), real=True)
    metric.update(drawn.double(), real=False)
    return float(metric.compute())


def kernel_distance(
    real: Tensor, drawn: Tensor, subsets: int = SUBSETS, size: int | None = None
) -> tuple[float, float]:
    """KID, the unbiased squared MMD of a cubic kernel (arXiv 1801.01401): mean and spread over random subsets."""
    size = min(SUBSET, len(real) // 2, len(drawn) // 2) if size is None else size
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # that it keeps the features
        metric = _torchmetrics("kid").KernelInceptionDistance(
            feature=_Given(real.shape[1]), subsets=subsets, subset_size=size
        )
    metric.update(real.double(), real=True)
    metric.update(drawn.double(), real=False)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        mean, spread = metric.compute()
    return float(mean), float(spread)


def cmmd(real: Tensor, drawn: Tensor) -> float:
    """CLIP-MMD, 1000 times the squared MMD of a Gaussian kernel of width 10 (arXiv 2401.09603).

    As its published code has it: the means over the kernel go over a picture with itself too, so it is never below 0.
    """

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        squared = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square()
        return torch.exp(-squared / (2 * CMMD_SIGMA**2)).mean()

    x, y = real.double(), drawn.double()
    return float(CMMD_SCALE * (kernel(x, x) + kernel(y, y) - 2 * kernel(x, y)))


def clip_score(pictures: Tensor, texts: Tensor) -> float:
    """100 times the mean cosine of picture and caption, 0 where it is below (arXiv 2104.08718, as torchmetrics)."""
    return float(100 * (pictures.double() * texts.double()).sum(1).clamp(min=0).mean())


def neighbourhoods(real: Tensor, drawn: Tensor, k: int = NEIGHBOURS) -> dict[str, float]:
    """Improved precision and recall (arXiv 1904.06991), density and coverage (arXiv 2002.09797).

    A picture's ball reaches to its k-th nearest neighbour of its own kind.
    """
    x, y = real.double(), drawn.double()
    between = torch.cdist(x, y)  # [real, drawn]
    real_radius, drawn_radius = _radius(x, k), _radius(y, k)
    inside = between <= real_radius[:, None]  # whether the drawn one lies in the real one's ball
    return {
        "precision": float(inside.any(0).double().mean()),
        "recall": float((between <= drawn_radius[None]).any(1).double().mean()),
        "density": float(inside.double().sum(0).mean() / k),
        "coverage": float((between.min(1).values <= real_radius).double().mean()),
    }


def _radius(x: Tensor, k: int) -> Tensor:
    """Each one's distance [N] to its k-th nearest neighbour, itself not counted."""
    return torch.cdist(x, x).kthvalue(k + 1, dim=1).values


# ---- differences of two models


@dataclass(frozen=True)
class Difference:
    """Of a figure of two models on the same captions and noise: second less first, and its standard error."""

    value: float
    error: float

    @property
    def real(self) -> bool:
        """Whether it exceeds what chance would make of it in 19 of 20 cases."""
        return abs(self.value) > 1.96 * self.error


def compared(
    real: Tensor, texts: Tensor, first: Tensor, second: Tensor, halves: int = HALVES
) -> dict[str, Difference]:
    """How the figures of two models' pictures differ, with errors from random halves of the captions, paired.

    The standard deviation over halves drawn without replacement estimates the error of the whole (delete-half
    jackknife, Shao & Wu 1989). A bootstrap would repeat samples, which makes neighbours of distance 0: it gives two
    to four times the error of the neighbours' figures, and the same for the others (docs/results.md).
    """
    figures: Mapping[str, Callable[[Tensor, Tensor, Tensor], float]] = {
        "frechet_distance": lambda r, d, _: frechet_distance(r, d),
        "kid": lambda r, d, _: kernel_distance(r, d, 1, len(r))[0],
        "cmmd": lambda r, d, _: cmmd(r, d),
        "clip_score": lambda _, d, t: clip_score(d, t),
    }
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randperm(len(real), generator=generator)[: len(real) // 2] for _ in range(halves)]

    def apart(rows: Any) -> dict[str, float]:
        r, t, a, b = real[rows], texts[rows], first[rows], second[rows]
        near, far = neighbourhoods(r, a), neighbourhoods(r, b)
        found = {name: figure(r, b, t) - figure(r, a, t) for name, figure in figures.items()}
        return found | {name: far[name] - near[name] for name in near}

    whole, sampled = apart(slice(None)), [apart(rows) for rows in parts]
    return {
        name: Difference(value, float(torch.tensor([one[name] for one in sampled]).std()))
        for name, value in whole.items()
    }


def as_json(differences: Mapping[str, Difference]) -> dict[str, Any]:
    return {name: asdict(found) | {"exceeds_its_error": found.real} for name, found in differences.items()}


# ---- torchmetrics


class _Given(torch.nn.Module):
    """A feature extractor for what are features already."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, features: Tensor) -> Tensor:
        return features


def check_installed() -> None:
    """Raises ConfigError where what is not there that the figures need."""
    _torchmetrics("fid")


def _torchmetrics(module: str) -> Any:
    from importlib import import_module

    try:
        return import_module(f"torchmetrics.image.{module}")
    except ImportError as error:
        raise ConfigError(
            f"the figures of --shards need {error.name}, which is not installed",
            remedy="run: bash launch/env.sh --extras evaluate",
        ) from error

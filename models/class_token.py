"""Class tokens after sampling: their nearest class, their agreement with the label, interpolation between two."""

import torch
import torch.nn.functional as F
from torch import Tensor


def cosines(tokens: Tensor, class_means: Tensor) -> Tensor:
    """Cosine similarity of each token with the mean token of each class: (N, D), (K, D) => (N, K) float32."""
    return F.normalize(tokens.float(), dim=1) @ F.normalize(class_means.to(tokens.device).float(), dim=1).T


def nearest_class(tokens: Tensor, class_means: Tensor) -> Tensor:
    """The class whose mean token is nearest by cosine: (N, D), (K, D) => (N,) int64."""
    return cosines(tokens, class_means).argmax(1)


def agreement(tokens: Tensor, label: Tensor, class_means: Tensor) -> Tensor:
    """Cosine with the mean token of the label's class minus the largest with another class's: (N,), float32.

    It is positive where the label's class is the nearest one.

    Args:
        tokens: (N, D).
        label: (N,) int64.
        class_means: (K, D) mean token of each class.
    """
    similar = cosines(tokens, class_means)
    own = similar.gather(1, label[:, None])[:, 0]
    return own - similar.scatter(1, label[:, None], -torch.inf).amax(1)


def between(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """Interpolate from token a to token b, both (D,): directions spherically, lengths linearly. weight: (N,) => (N, D)."""
    length = torch.lerp(a.norm(), b.norm(), weight)[:, None]
    angle = torch.arccos((F.normalize(a, dim=0) @ F.normalize(b, dim=0)).clamp(-1, 1))
    if angle < 1e-4:
        return torch.lerp(a, b, weight[:, None])
    w = weight[:, None]
    direction = torch.sin((1 - w) * angle) * F.normalize(a, dim=0) + torch.sin(w * angle) * F.normalize(b, dim=0)
    return length * direction / torch.sin(angle)

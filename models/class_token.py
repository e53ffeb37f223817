"""What a class token says: the class it names, how well it fits its label, and the tokens between two."""

import torch
import torch.nn.functional as F
from torch import Tensor


def cosines(tokens: Tensor, class_means: Tensor) -> Tensor:
    """Cosine of each token with each class's mean token: (N, D), (K, D) => (N, K) float32."""
    return F.normalize(tokens.float(), dim=1) @ F.normalize(class_means.to(tokens.device).float(), dim=1).T


def nearest_class(tokens: Tensor, class_means: Tensor) -> Tensor:
    """(N,) int64: the class each token names."""
    return cosines(tokens, class_means).argmax(1)


def agreement(tokens: Tensor, label: Tensor, class_means: Tensor) -> Tensor:
    """(N,): cosine with the own class's mean minus the largest with another's; positive: the token names its label."""
    similar = cosines(tokens, class_means)
    own = similar.gather(1, label[:, None])[:, 0]
    return own - similar.scatter(1, label[:, None], -torch.inf).amax(1)


def between(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """On the way from token a to token b, both (D,): directions on the great circle, lengths linearly. weight: (N,)."""
    length = torch.lerp(a.norm(), b.norm(), weight)[:, None]
    angle = torch.arccos((F.normalize(a, dim=0) @ F.normalize(b, dim=0)).clamp(-1, 1))
    if angle < 1e-4:
        return torch.lerp(a, b, weight[:, None])
    w = weight[:, None]
    direction = torch.sin((1 - w) * angle) * F.normalize(a, dim=0) + torch.sin(w * angle) * F.normalize(b, dim=0)
    return length * direction / torch.sin(angle)

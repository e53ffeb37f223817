"""What enters the network: patches of the latent, time, label and class token, each as vectors of the network's width.

Legend: N batch, C latent channels, p patch size, P patches, F frequencies, D width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PatchEmbedder(nn.Module):
    """Cut the latent into patches and embed each one linearly.

    The weight has the shape of a convolution's, as in published checkpoints. A convolution whose stride is its size is
    a matrix product of the flattened patches, and that is how it runs: backward as well, tokens come out contiguous.
    """

    def __init__(self, in_channels: int, hidden_size: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        p = self.proj.kernel_size[0]
        cells = x.view(n, c, h // p, p, w // p, p).permute(0, 2, 4, 1, 3, 5)
        patches = cells.reshape(n, -1, c * p * p)  # (N, P, C p^2)
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)  # (N, P, D)


class TimestepEmbedder(nn.Module):
    """Sinusoidal features of t (in [0, 1], not rescaled, as published), then a two-layer MLP."""

    def __init__(self, hidden_size: int, num_frequencies: int = 256) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(num_frequencies, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )
        self.register_buffer("frequencies", torch.empty(num_frequencies // 2), persistent=False)
        self.reset_frequencies()

    def reset_frequencies(self) -> None:
        """Fill the table anew, after the module was materialised from the meta device."""
        half = len(self.frequencies)
        exponents = torch.arange(half, dtype=torch.float32, device="cpu") / half
        self.frequencies.copy_(torch.exp(-math.log(10000) * exponents))

    def forward(self, t: Tensor) -> Tensor:
        angles = t[:, None].float() * self.frequencies  # (N, F/2)
        return self.mlp(torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1).to(t.dtype))  # (N, D)


class LabelEmbedder(nn.Module):
    """One vector per class, and one for the null class at index num_classes. Label dropout is applied in loss.py."""

    def __init__(self, num_classes: int, hidden_size: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)  # (N, D)


class ClassTokenEmbedder(nn.Module):
    """REG's input of the class token (REG section 3): project the noisy token to the network's width and normalise it."""

    def __init__(self, class_token_dim: int, hidden_size: int) -> None:
        super().__init__()
        self.proj = nn.Linear(class_token_dim, hidden_size)
        self.norm = nn.LayerNorm(hidden_size, eps=1e-6)

    def forward(self, class_token: Tensor) -> Tensor:
        return self.norm(self.proj(class_token)).unsqueeze(1)  # (N, 1, D)

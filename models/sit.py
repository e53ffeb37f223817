"""SiT: a diffusion transformer with adaLN-Zero conditioning, and REG's extra class-token slot (REG section 3).

Legend: N batch, C latent channels, H W latent size, p patch size, P = HW/p^2 patches, T tokens (P, plus one with the
class-token slot, which comes first), D width, E width of the class token.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from config import UserError
from models.adaptive_norm import AdaptiveNorm
from models.choices import check
from models.embedders import ClassTokenEmbedder, LabelEmbedder, PatchEmbedder, TimestepEmbedder

SIZES = {  # depth, hidden size, heads
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
}
PATCH_SIZES = (2, 4, 8)
PRESETS = tuple(f"SiT-{size}/{patch}" for size in SIZES for patch in PATCH_SIZES)


@dataclass(frozen=True)
class SiTConfig:
    """Everything that determines the network's shape; stored in every model file, from which it is rebuilt."""

    depth: int = 28
    hidden_size: int = 1152
    num_heads: int = 16
    patch_size: int = 2
    input_size: int = 32  # H = W of the latent
    in_channels: int = 4
    num_classes: int = 1000  # the null class of classifier-free guidance has this index
    mlp_ratio: float = 4.0
    qk_norm: bool = False
    class_token_dim: int = 768  # 0: no class-token slot (plain SiT, REPA)
    align_dims: tuple[int, ...] = (768,)  # token width of each aligned encoder; (): no alignment
    align_depth: int = 8  # the projectors read the tokens after this many blocks
    projector_dim: int = 2048

    def __post_init__(self) -> None:
        object.__setattr__(self, "align_dims", tuple(self.align_dims))  # a list, when read from JSON
        for name in ("depth", "hidden_size", "num_heads", "patch_size", "input_size", "in_channels", "num_classes"):
            if getattr(self, name) < 1:
                raise UserError(f"SiTConfig.{name} must be at least 1, got {getattr(self, name)}")
        if self.hidden_size % self.num_heads or self.hidden_size % 4:
            raise UserError(f"hidden_size {self.hidden_size} must be divisible by num_heads {self.num_heads} and by 4")
        if self.input_size % self.patch_size:
            raise UserError(f"input_size {self.input_size} must be divisible by patch_size {self.patch_size}")
        if self.align_dims and not 1 <= self.align_depth <= self.depth:
            raise UserError(f"alignment after block {self.align_depth}, but the network has blocks 1 to {self.depth}")

    @property
    def num_patches(self) -> int:
        return (self.input_size // self.patch_size) ** 2

    @property
    def num_tokens(self) -> int:
        return self.num_patches + (self.class_token_dim > 0)


def preset(name: str, **changes: Any) -> SiTConfig:
    """The config of a published size such as "SiT-XL/2", with `changes` to any field of SiTConfig.

    The alignment depth follows REG (S, B: 4; L, XL: 8). Raises UserError for an unknown name.
    """
    check("model", name, PRESETS)
    size, patch = name.removeprefix("SiT-").split("/")
    depth, hidden_size, num_heads = SIZES[size]
    shape = {"depth": depth, "hidden_size": hidden_size, "num_heads": num_heads, "patch_size": int(patch)}
    return SiTConfig(**{**shape, "align_depth": 4 if size in ("S", "B") else 8, **changes})


class SiTOutput(NamedTuple):
    """The joint prediction: velocity (N, C, H, W), class_velocity (N, E) or None, and projections, one (N, T, E_k) for each
    aligned encoder, class token first; empty unless asked for."""

    velocity: Tensor
    class_velocity: Tensor | None
    projections: tuple[Tensor, ...]


class Attention(nn.Module):
    """Multi-head self-attention; qk_norm normalises queries and keys per head (LayerNorm, as published)."""

    def __init__(self, config: SiTConfig) -> None:
        super().__init__()
        head_dim = config.hidden_size // config.num_heads
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.q_norm = nn.LayerNorm(head_dim) if config.qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(head_dim) if config.qk_norm else nn.Identity()
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        heads = (n, t, self.num_heads, d // self.num_heads)
        q, k, v = (part.view(heads).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)  # autocast leaves LayerNorm's output in fp32
        x = F.scaled_dot_product_attention(q, k, v)  # (N, heads, T, D / heads)
        return self.proj(x.transpose(1, 2).reshape(n, t, d))


class MLP(nn.Module):
    """Two linear layers with tanh-approximated GELU between."""

    def __init__(self, config: SiTConfig) -> None:
        super().__init__()
        hidden = int(config.hidden_size * config.mlp_ratio)
        self.fc1 = nn.Linear(config.hidden_size, hidden)
        self.fc2 = nn.Linear(hidden, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class SiTBlock(nn.Module):
    """Transformer block with adaLN-Zero: shift, scale and gate of both branches come from the conditioning."""

    def __init__(self, config: SiTConfig) -> None:
        super().__init__()
        self.norm1 = AdaptiveNorm(config.hidden_size)
        self.attn = Attention(config)
        self.norm2 = AdaptiveNorm(config.hidden_size)
        self.mlp = MLP(config)
        self.modulation = nn.Linear(config.hidden_size, 6 * config.hidden_size)

    def forward(self, x: Tensor, c: Tensor, gate: Tensor | None = None, branch: Tensor | None = None) -> Tensor:
        # not self.deferred, which may be compiled by itself: the whole block is one region
        x, gate, branch = SiTBlock.deferred(self, x, c, gate, branch)
        return x + gate * branch

    def deferred(self, x: Tensor, c: Tensor, gate: Tensor | None, branch: Tensor | None) -> tuple[Tensor, ...]:
        """The block without its last addition, x + gate * branch, which the next one does while it reads x."""
        modulation = self.modulation(c).unsqueeze(1).chunk(6, dim=-1)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation  # (N, 1, D) each
        total, h = self.norm1(x, shift1, scale1, gate, branch)
        total, h = self.norm2(total, shift2, scale2, gate1, self.attn(h), (x, gate, branch))
        return total, gate2, self.mlp(h)


class FinalLayer(nn.Module):
    """One adaLN layer for all tokens, then a linear map for the patches and another one for the class token."""

    def __init__(self, config: SiTConfig) -> None:
        super().__init__()
        self.norm = AdaptiveNorm(config.hidden_size)
        self.modulation = nn.Linear(config.hidden_size, 2 * config.hidden_size)
        self.linear = nn.Linear(config.hidden_size, config.patch_size**2 * config.in_channels)
        self.class_token_linear: nn.Linear | None = None
        if config.class_token_dim:
            self.class_token_linear = nn.Linear(config.hidden_size, config.class_token_dim)

    def forward(self, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor | None]:
        shift, scale = self.modulation(c).unsqueeze(1).chunk(2, dim=-1)
        _, x = self.norm(x, shift, scale)
        if self.class_token_linear is None:
            return self.linear(x), None
        return self.linear(x[:, 1:]), self.class_token_linear(x[:, 0])  # (N, P, p^2 C), (N, E)


class SiT(nn.Module):
    """The network v(x_t, c_t, t, y) of REG section 3; without class_token_dim it is SiT (REPA)."""

    def __init__(self, config: SiTConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False  # recompute each block in the backward pass
        self.deferred = False  # blocks leave their last addition to the next one, which saves memory traffic
        d = config.hidden_size
        self.x_embedder = PatchEmbedder(config.in_channels, d, config.patch_size)
        self.t_embedder = TimestepEmbedder(d)
        self.y_embedder = LabelEmbedder(config.num_classes, d)
        if config.class_token_dim:
            self.class_token_embedder = ClassTokenEmbedder(config.class_token_dim, d)
        # Fixed, yet part of the state dict: the EMA of published checkpoints has drifted from it by rounding.
        self.register_buffer("pos_embed", torch.zeros(1, config.num_tokens, d))  # (1, T, D)
        self.blocks = nn.ModuleList(SiTBlock(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config)
        self.projectors = nn.ModuleList(Projector(d, config.projector_dim, e) for e in config.align_dims)
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """Every linear layer: xavier uniform, bias 0. Label table and time MLP: normal, std 0.02. Position embedding:
        2-D sin-cos, zero for the class token. Zero: all modulations (each block starts as the identity) and both output
        layers (the first prediction is 0)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        patch_embedding = self.x_embedder.proj  # a linear map of the flattened patch, initialised as one
        nn.init.xavier_uniform_(patch_embedding.weight.view(patch_embedding.weight.shape[0], -1))
        nn.init.zeros_(patch_embedding.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[0].weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[2].weight, std=0.02)
        with torch.no_grad():
            side = self.config.input_size // self.config.patch_size
            patches = sincos_position_embedding(self.config.hidden_size, side)
            self.pos_embed[:, -len(patches) :].copy_(patches)
        final = self.final_layer
        outputs = [final.modulation, final.linear, final.class_token_linear, *(b.modulation for b in self.blocks)]
        for layer in filter(None, outputs):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor, class_token: Tensor | None = None, *, project: bool = False
    ) -> SiTOutput:
        """Predict the joint velocity of latent and class token (REG section 3).

        Args:
            x: (N, C, H, W) noisy latent.
            t: (N,) in [0, 1].
            y: (N,) int64 labels, num_classes for the null class.
            class_token: (N, E) noisy class token, given exactly if the config has the slot.
            project: also return the projections for the alignment loss.

        Raises:
            ValueError: a shape contradicts the config.
        """
        self._check(x, class_token)
        x, c = self.embed(x, t, y, class_token)
        projections: tuple[Tensor, ...] = ()
        gate = branch = None  # what a block has left to the next one to add
        for i, block in enumerate(self.blocks, start=1):
            aligned = project and i == self.config.align_depth
            if self.gradient_checkpointing and self.training:
                # a block draws no random numbers: no generator's state to keep
                x = checkpoint(block, x, c, use_reentrant=False, preserve_rng_state=False)
            elif self.deferred and torch.is_grad_enabled() and not aligned and i < len(self.blocks):
                x, gate, branch = block.deferred(x, c, gate, branch)
            else:
                x, gate, branch = block(x, c, gate, branch), None, None
            if aligned:
                projections = tuple(p(x) for p in self.projectors)  # (N, T, E_k) each
        patches, class_velocity = self.final_layer(x, c)
        return SiTOutput(self.unpatchify(patches), class_velocity, projections)

    def embed(self, x: Tensor, t: Tensor, y: Tensor, class_token: Tensor | None) -> tuple[Tensor, Tensor]:
        """Tokens (N, T, D) with their positions, and the conditioning (N, D), with which every block and output layer is
        modulated. Arguments as in `forward`."""
        x = self.x_embedder(x)  # (N, P, D)
        if class_token is not None:
            x = torch.cat([self.class_token_embedder(class_token), x], dim=1)
        # every modulation starts with this SiLU
        return x + self.pos_embed, F.silu(self.t_embedder(t) + self.y_embedder(y))

    def unpatchify(self, x: Tensor) -> Tensor:
        """(N, P, p^2 C), channels last within a patch => (N, C, H, W)."""
        p, c = self.config.patch_size, self.config.in_channels
        side = self.config.input_size // p
        return x.view(-1, side, side, p, p, c).permute(0, 5, 1, 3, 2, 4).reshape(-1, c, side * p, side * p)

    def _check(self, x: Tensor, class_token: Tensor | None) -> None:
        config = self.config
        expected = (config.in_channels, config.input_size, config.input_size)
        if tuple(x.shape[1:]) != expected:
            raise ValueError(f"the network was built for latents of shape {expected}, got {tuple(x.shape[1:])}")
        width = 0 if class_token is None else class_token.shape[-1]
        if width != config.class_token_dim:
            raise ValueError(f"the network was built for a class token of width {config.class_token_dim}, got {width}")


class Projector(nn.Sequential):
    """REPA's projection head (REPA section 3): three linear layers with SiLU between."""

    def __init__(self, hidden_size: int, projector_dim: int, out_dim: int) -> None:
        super().__init__(
            nn.Linear(hidden_size, projector_dim),
            nn.SiLU(),
            nn.Linear(projector_dim, projector_dim),
            nn.SiLU(),
            nn.Linear(projector_dim, out_dim),
        )

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)  # torch 2.11 compiles no code of torch.nn itself


def sincos_position_embedding(dim: int, side: int) -> Tensor:
    """Fixed 2-D sin-cos embedding of a side x side grid, row-major => (side^2, dim) float32.

    The first half of the channels encodes the column, the second half the row (MAE's convention, as published).
    """
    omega = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * omega  # (side, dim / 4)
    axis = torch.cat([torch.sin(angles), torch.cos(angles)], dim=1)  # (side, dim / 2)
    columns = axis[None].expand(side, -1, -1)
    rows = axis[:, None].expand(-1, side, -1)
    return torch.cat([columns, rows], dim=-1).reshape(side * side, dim).float()

"""What diffuses: the image latent and, with representation entanglement, the class token beside it."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class State(NamedTuple):
    """latent: (N, C, H, W). class_token: (N, D), or None for a network without the class-token slot (SiT, REPA).

    Used for data, noise, interpolated states and velocities alike: every formula is written once and mapped over both.
    """

    latent: Tensor
    class_token: Tensor | None = None

    def map(self, function: Callable[..., Tensor], *others: "State") -> "State":
        """Apply `function` to the latents and to the class tokens of self and others; a missing token stays None."""
        latent = function(self.latent, *[o.latent for o in others])
        if self.class_token is None:
            return State(latent)
        return State(latent, function(self.class_token, *[o.class_token for o in others]))

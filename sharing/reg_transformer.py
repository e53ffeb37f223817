"""The network of REG, REPA and SiT as a model of diffusers."""

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from models.sit import SiT, SiTConfig, SiTOutput


class REGTransformer(ModelMixin, ConfigMixin):
    """SiT with REG's class-token slot (REG section 3); `network` is the SiT, the arguments are those of SiTConfig."""

    @register_to_config
    def __init__(
        self,
        depth: int = 28,
        hidden_size: int = 1152,
        num_heads: int = 16,
        patch_size: int = 2,
        input_size: int = 32,
        in_channels: int = 4,
        num_classes: int = 1000,
        mlp_ratio: float = 4.0,
        qk_norm: bool = False,
        class_token_dim: int = 768,
    ) -> None:
        super().__init__()
        shape = SiTConfig(
            depth=depth,
            hidden_size=hidden_size,
            num_heads=num_heads,
            patch_size=patch_size,
            input_size=input_size,
            in_channels=in_channels,
            num_classes=num_classes,
            mlp_ratio=mlp_ratio,
            qk_norm=qk_norm,
            class_token_dim=class_token_dim,
            align_dims=(),
        )
        self.network = SiT(shape)

    def forward(self, x: Tensor, t: Tensor, y: Tensor, class_token: Tensor | None = None) -> SiTOutput:
        """Predict the joint velocity; arguments as of `SiT.forward`."""
        return self.network(x, t, y, class_token)

"""Random streams of the counter-based generator, one per purpose, and standard normal noise shaped as States."""

from collections.abc import Sequence
from enum import IntEnum

from torch import Tensor

from models import philox
from models.sit import SiTConfig
from models.state import State


class Stream(IntEnum):
    """Purposes of philox draws. Numbers in this table never change: a stream's draws are part of every result."""

    TRAINING_NORMALS = 0  # posterior, noise, log-normal t
    TRAINING_UNIFORMS = 1  # t, label dropout
    DATA_ORDER = 2
    PREVIEW = 3  # previews and the Frechet distance during training
    CKNNA = 4
    SAMPLE_START = 16  # candidate k of --best-of adds k << 8 to this and the next one
    SAMPLE_STEP = 17
    SAMPLE_LABEL = 18


_STEPS_AT_ONCE = 8  # on a GPU: a step's noise is many small kernels, those of eight steps cost hardly more


def latent_size(config: SiTConfig) -> int:
    """Numbers in one latent."""
    return config.in_channels * config.input_size**2


def as_state(z: Tensor, config: SiTConfig) -> State:
    """Flat numbers (N, latent_size + class_token_dim) => State."""
    latent, token = z.split([latent_size(config), config.class_token_dim], dim=1)
    shape = (config.in_channels, config.input_size, config.input_size)
    return State(latent.reshape(-1, *shape), token if config.class_token_dim else None)


def normal_state(config: SiTConfig, seed: int, stream: int, step: int, index: Tensor) -> State:
    """Standard normal State of the samples `index` (N,) int64, a function of (seed, stream, step, index); float32."""
    return as_state(philox.normal(seed, stream, step, index, latent_size(config) + config.class_token_dim), config)


class NoiseSource:
    """Noise of the samples `index` in generate.py: functions of (seed, index, step) alone."""

    def __init__(self, config: SiTConfig, seed: int, index: Tensor, num_steps: int, candidate: int = 0) -> None:
        """Draws nothing yet.

        Args:
            config: of the network, for the shapes.
            seed: of the whole set of samples.
            index: (N,) int64, the samples' global numbers, on the device that samples.
            num_steps: upper bound of the steps that will be asked for, in order.
            candidate: number of the draw among those of --best-of.
        """
        self.config, self.seed, self.index, self.num_steps = config, seed, index, num_steps
        self.offset = candidate << 8
        self.at_once = _STEPS_AT_ONCE if index.is_cuda else 1
        self._ready: dict[int, Tensor] = {}

    def start(self) -> State:
        """The State at t = 1, float32."""
        return normal_state(self.config, self.seed, Stream.SAMPLE_START + self.offset, 0, self.index)

    def __call__(self, step: int) -> State:
        """The noise of one step of an SDE, float32."""
        if step not in self._ready:
            steps: Sequence[int] = range(step, min(step + self.at_once, max(self.num_steps, step + 1)))
            size = latent_size(self.config) + self.config.class_token_dim
            drawn = philox.normals(self.seed, Stream.SAMPLE_STEP + self.offset, steps, self.index, size)
            self._ready = dict(zip(steps, drawn, strict=True))
        return as_state(self._ready.pop(step), self.config)

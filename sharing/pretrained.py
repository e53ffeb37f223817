"""A trained SiT as a library object: load, sample, save and push, with huggingface_hub's mixin.

from sharing.pretrained import PretrainedSiT

model = PretrainedSiT.from_pretrained("OWNER/NAME").to("cuda")
state = model.sample(["golden retriever", "otter"], num_steps=50, cfg_scale=2.3)
pictures = model.autoencoder.decode(state.latent)     # uint8 (2, 3, 256, 256)
"""

from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelHubMixin

from common.provenance import weights_sha256
from config import UserError, parse
from models import hub
from models.acceleration import DTYPES
from models.autoencoder import Autoencoder
from models.interpolant import Interpolant
from models.local_networks import is_local, portable
from models.model_file import SHARED_FILE, Model, ModelInfo, load_model, save_model
from models.obtain import obtain
from models.sit import SiT
from models.solvers import Progress
from models.state import State
from sampling.labels import class_label
from sampling.loading import load_decoder
from sampling.sampler import Sampler, guidance_of, solver_of
from sampling.settings import SampleConfig, check, resolved
from sharing.card import model_card
from sharing.settings import ExportConfig

_SAMPLING = tuple(
    field.name
    for field in fields(SampleConfig)
    if field.metadata["group"] in ("solver", "guidance") and field.name != "guide_checkpoint"
)


class PretrainedSiT(ModelHubMixin):
    """A SiT with the header of its model file and its VAE; save_pretrained and push_to_hub are huggingface_hub's."""

    _hub_mixin_config: Any = {}  # noqa: RUF012 (the mixin's: it would copy the arguments of __init__ otherwise)

    def __init__(self, model: Model, autoencoder: Autoencoder | None = None) -> None:
        """Wrap a model file in memory; its VAE is looked for at the first use unless it is given."""
        self.model = model
        self._hub_mixin_config = asdict(self._shared_info())  # what the mixin writes to config.json
        if autoencoder is not None:
            self.autoencoder = autoencoder

    def _shared_info(self) -> ModelInfo:
        """The header without the paths of this machine that files of former versions hold."""
        encoders, vae = tuple(map(portable, self.info.encoders)), self.info.vae
        return replace(self.info, encoders=encoders, vae="./vae" if is_local(vae) else vae)

    @property
    def network(self) -> SiT:
        return self.model.network

    @property
    def info(self) -> ModelInfo:
        return self.model.info

    @cached_property
    def autoencoder(self) -> Autoencoder:
        """Decodes latents of `sample`, on the device of the network."""
        return load_decoder(self.model, None, next(self.network.parameters()).device)

    def to(self, device: torch.device | str) -> "PretrainedSiT":
        """Move network, class means and, if it was used before, the VAE to a device, in place."""
        self.network.to(device)
        if "autoencoder" in vars(self):
            self.autoencoder.to(device)
        if self.model.class_means is not None:
            self.model.class_means = self.model.class_means.to(device)
        return self

    def sample(
        self,
        labels: Sequence[str | int],
        *,
        seed: int = 0,
        progress: Progress | None = None,
        **settings: str | int | float | None,
    ) -> State:
        """Sample one latent, and class token, for each label: sample i of `generate.py --seed --labels`.

        Args:
            labels: names or numbers of classes.
            seed: of the noise.
            progress: takes the finished fraction after each step.
            settings: of solver and guidance, by the names of generate.py's flags: num_steps, mode, cfg_scale, ...

        Raises:
            UserError: a label is not a class of the model; a setting does not exist, or its value is not allowed.
        """
        unknown = sorted(settings.keys() - set(_SAMPLING))
        if unknown:
            raise UserError(f"sample() has no setting {unknown[0]!r}, it takes {', '.join(_SAMPLING)}")
        info, device = self.info, next(self.network.parameters()).device
        flags = [_flag(name, value) for name, value in settings.items() if value is not None]
        asked = parse(SampleConfig, "", ["--checkpoint=.", "--out=.", f"--seed={seed}", *flags])
        check(asked)
        chosen = resolved(asked, null_class=info.cfg_prob > 0)
        numbers = [
            class_label(
                f"number:{label}" if isinstance(label, int) else label, info.network.num_classes, info.classes, "labels"
            )
            for label in labels
        ]
        sampler = Sampler(
            self.network,
            Interpolant(info.path),
            solver_of(chosen),
            guidance_of(chosen),
            seed=seed,
        )
        index, label = torch.arange(len(numbers), device=device), torch.tensor(numbers, device=device)
        return sampler(index, label, progress=progress).state

    def write(self, folder: Path, dtype: str = "fp32") -> None:
        """Write model.safetensors and, where it is no repository of the hub, the VAE beside it.

        Args:
            folder: that exists.
            dtype: precision of the stored weights; the VAE, by whose digest latents are compared, keeps its own.
        """
        info = self._shared_info()
        if is_local(info.vae):
            self.autoencoder.vae.register_to_config(_name_or_path="")  # diffusers keeps where it was read
            self.autoencoder.vae.save_pretrained(folder / "vae")
            info = replace(info, vae_weights=weights_sha256(self.autoencoder, by_name=True))
        weights = {name: tensor.to(DTYPES[dtype]) for name, tensor in self.network.state_dict().items()}
        save_model(folder / SHARED_FILE, weights, info, self.model.class_means)

    def _save_pretrained(self, save_directory: Path) -> None:
        self.write(save_directory)
        if not (save_directory / "README.md").exists():
            settings = ExportConfig(Path(), save_directory)
            (save_directory / "README.md").write_text(model_card(save_directory, self.info, settings), encoding="utf-8")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **download: Any) -> "PretrainedSiT":
        """Load a model, in eval mode on the CPU.

        Args:
            pretrained_model_name_or_path: folder of save_pretrained, model file, run, published .pt, or OWNER/NAME[/FILE] on
                the hub.
            download: revision, token, cache_dir, ... of huggingface_hub's snapshot_download, for OWNER/NAME.

        Raises:
            UserError: it cannot be had or is something else.
        """
        if download:
            name = str(pretrained_model_name_or_path)
            pretrained_model_name_or_path = hub.snapshot(name, [SHARED_FILE, "vae/*"], **download)
        return cls(load_model(obtain(pretrained_model_name_or_path)))


def _flag(name: str, value: str | int | float) -> str:
    """A setting as generate.py's command line has it, whose checks then apply."""
    word = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{word}" if value else f"--no-{word}"
    return f"--{word}={value}"

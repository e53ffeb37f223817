"""REG, REPA and SiT as a pipeline of diffusers: classes => pictures.

from pipeline import REGPipeline     # in this folder, or from anywhere else:
DiffusionPipeline.from_pretrained(FOLDER, custom_pipeline="pipeline", trust_remote_code=True)
"""

import importlib.util
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ModelMixin, SchedulerMixin
from diffusers.utils import BaseOutput
from PIL import Image

from models.autoencoder import Autoencoder, LatentNormalization
from sampling.labels import class_label


@dataclass
class REGOutput(BaseOutput):
    """images: PIL images, or (N, H, W, 3) uint8 for "np", or latents. class_tokens: (N, E) float64, or None."""

    images: Any
    class_tokens: torch.Tensor | None


class REGPipeline(DiffusionPipeline):
    """Pictures of classes: `pipe(class_labels=["golden retriever"], num_inference_steps=50, guidance_scale=2.3).images`."""

    model_cpu_offload_seq = "transformer->vae"

    def __init__(
        self,
        vae: AutoencoderKL,
        transformer: ModelMixin,
        scheduler: SchedulerMixin,
        id2label: dict[str, str] | None = None,
        normalization: dict[str, Any] | None = None,
    ) -> None:
        """Keep the parts; id2label names the classes, normalization is that of the latents (see LatentNormalization)."""
        super().__init__()
        self.register_modules(vae=vae, transformer=transformer, scheduler=scheduler)
        self.register_to_config(id2label=id2label or {}, normalization=normalization)

    @classmethod
    def from_pretrained(cls, folder: str | Path, **kwargs: Any) -> "REGPipeline":
        """Load a folder of `python -m sharing.export --format diffusers`, with the code of its parts from the folder.

        Args:
            folder: or OWNER/NAME on the hub, which needs trust_remote_code=True.
            kwargs: as of DiffusionPipeline.from_pretrained.
        """
        place = Path(folder)
        if place.is_dir() and not kwargs.get("trust_remote_code"):
            named = json.loads((place / "model_index.json").read_text(encoding="utf-8"))
            for part in ("transformer", "scheduler"):
                module, name = named[part]
                kwargs.setdefault(
                    part, getattr(_module(place / part / f"{module}.py"), name).from_pretrained(place / part)
                )
        return super().from_pretrained(folder, **kwargs)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[str | int],
        num_inference_steps: int = 250,
        guidance_scale: float = 1.0,
        class_guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        seed: int | None = None,
        generator: torch.Generator | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> REGOutput | tuple[Any, ...]:
        """Sample one picture for each label.

        Args:
            class_labels: names or numbers of classes.
            num_inference_steps: of the solver.
            guidance_scale: of classifier-free guidance; 1: none. class_guidance_scale: the class token's; None: the same.
            class_guidance_scale: see guidance_scale.
            guidance_interval: of t, where guidance is on; t = 1 is noise.
            seed: of the noise; picture i is sample i of `generate.py --seed`. None: drawn from `generator`.
            generator: draws the seed; None: torch's own.
            output_type: "pil", "np" or "latent".
            return_dict: False returns a tuple.

        Raises:
            ValueError: a label is not a class of the model.
        """
        names = [self.config.id2label[key] for key in sorted(self.config.id2label, key=int)]
        network, device = self.transformer.network, self._execution_device
        numbers = [
            class_label(
                f"number:{label}" if isinstance(label, int) else label,
                network.config.num_classes,
                names,
                "class_labels",
            )
            for label in class_labels
        ]
        if seed is None:
            seed = int(torch.randint(2**62, (1,), generator=generator, device=generator.device if generator else "cpu"))
        with self.progress_bar(total=num_inference_steps) as bar:
            latent, token = self.scheduler.sample(
                network,
                torch.tensor(numbers, device=device),
                seed=seed,
                num_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                class_guidance_scale=class_guidance_scale,
                guidance_interval=guidance_interval,
                dtype=self.transformer.dtype,
                progress=lambda done: bar.update(round(done * num_inference_steps) - bar.n),
            )
        images: Any = latent
        if output_type != "latent":
            autoencoder = Autoencoder(self.vae, "vae")
            if self.config.normalization is not None:
                autoencoder.normalization = LatentNormalization(**self.config.normalization)
            images = autoencoder.decode(latent).permute(0, 2, 3, 1).cpu().numpy()
            if output_type == "pil":
                images = [Image.fromarray(one) for one in images]
        self.maybe_free_model_hooks()
        return REGOutput(images=images, class_tokens=token) if return_dict else (images, token)


def _module(file: Path) -> Any:
    """Import a file of the folder under its own name, which is the one that diffusers looks for."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = sys.modules[file.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

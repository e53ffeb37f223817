"""Samples of a network against the training images, in several feature spaces; and what its class tokens say."""

import math
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.arrays import read_npy
from common.files import fingerprint, replacing
from common.lock import wait_for
from common.processes import gather_rows, in_turn, rank, world
from dataset import PackedDataset
from evaluations import features
from evaluations.coherence import token_metrics
from evaluations.collect import collect
from evaluations.features import Extractor
from evaluations.image_sets import ImageSet, open_images
from evaluations.layers import measure, read_targets
from evaluations.metrics import frechet_distance
from evaluations.settings import CknnaConfig
from evaluations.sliced import Mind
from evaluations.statistics import compute_statistics
from models.autoencoder import Autoencoder
from models.class_token import nearest_class
from models.guidance import Guidance
from models.interpolant import Interpolant
from models.model_file import Model, ModelInfo
from models.samplers import Solver
from models.sit import SiT
from sampling.sampler import Sampler
from study.lite import load_teacher

SAMPLING_SEED = 0  # of the noise: the same for all rows, seeds and steps
CKNNA_TIME, CKNNA_IMAGES, NEIGHBOURS = 0.5, 500, 10


class Samples(NamedTuple):
    """pixels: (N, 3, H, W) uint8. label: (N,) int64. token: (N, D) generated class tokens, or None."""

    pixels: Tensor
    label: Tensor
    token: Tensor | None


def draw(
    network: SiT,
    autoencoder: Autoencoder,
    count: int,
    *,
    path: str,
    steps: int,
    batch: int,
    guidance: Guidance,
) -> Samples:
    """`count` samples by Heun's ODE solver, drawn by all ranks and gathered on rank 0; labels go round all classes.

    Args:
        network: in eval mode on its device.
        autoencoder: decodes them.
        count: samples of all ranks together.
        path: interpolant of the network.
        steps: of the solver, two evaluations each.
        batch: samples at a time.
        guidance: of the velocity.
    """
    device = next(network.parameters()).device
    solver = Solver("ode", "heun", steps)
    sampler = Sampler(network, Interpolant(path), solver, guidance, seed=SAMPLING_SEED)

    def parts() -> Iterator[Samples]:
        for index in torch.arange(count).tensor_split(world())[rank()].split(batch):
            index = index.to(device)
            label = index % network.config.num_classes
            state = sampler(index, label).state
            token = None if state.class_token is None else state.class_token.float().cpu()
            yield Samples(autoencoder.decode(state.latent).cpu(), label.cpu(), token)

    pixels, label, token = zip(*parts())
    tokens = None if token[0] is None else gather_rows(torch.cat(token))
    return Samples(gather_rows(torch.cat(pixels)), gather_rows(torch.cat(label)), tokens)


class Judge:
    """Feature networks with the features of the training images; all ranks make it, rank 0 alone judges."""

    def __init__(
        self, train: Path, spaces: tuple[str, ...], device: torch.device, batch: int, cache: Path | None = None
    ) -> None:
        """Load the networks and read the training images.

        Args:
            train: images, as evaluate.py takes them.
            spaces: as evaluate.py --features takes them.
            device: of the networks.
            batch: images at a time.
            cache: folder that keeps the features of the training images for the next program.
        """
        self.device, self.batch = device, batch
        self.spaces = in_turn(lambda: [features.load(spec, device=device) for spec in spaces])
        images = open_images([train])
        classes = 0 if images.labels is None else len(np.unique(images.labels))
        named = [space.space for space in self.spaces if space.classes == classes > 0]
        self.classifier = named[0] if named else None  # others have no classes, or those of other images
        self.statistics, self.mind = {}, {}
        for space in self.spaces:
            train = _features(images, space, batch, cache).to(device)
            self.statistics[space.space], self.mind[space.space] = compute_statistics(train), Mind(train)

    @property
    def digests(self) -> dict[str, str]:
        """Which weights judge, by space."""
        return {space.space: space.digest[:16] for space in self.spaces}

    def images(self, pixels: Tensor, label: Tensor | None) -> dict[str, float]:
        """Distances to the training images in each space, and the accuracy of labels by the network that has these classes.

        Args:
            pixels: (N, 3, H, W) uint8.
            label: (N,) int64; None: not to be measured.
        """
        found = {}
        for space in self.spaces:
            parts = [space(part) for part in pixels.split(self.batch)]  # moved to the device by the space
            pooled = torch.cat([part.pooled.float().cpu() for part in parts])
            if label is not None and space.space == self.classifier:
                named = torch.cat([part.logits.argmax(1).cpu() for part in parts if part.logits is not None])
                found["class_accuracy"] = (named == label).double().mean().item()
            found[f"fd_{space.space}"] = frechet_distance(self.statistics[space.space], compute_statistics(pooled))
            estimate = self.mind[space.space](pooled.to(self.device))
            found[f"mind_{space.space}"] = estimate.value
            found[f"mind_{space.space}_error"] = estimate.error or 0.0
        return found


def _features(images: ImageSet, space: Extractor, batch: int, cache: Path | None) -> Tensor:
    """Pooled features (N, D); of several programs one computes them, and the others read what it has kept."""
    if cache is None or world() > 1:
        return collect(images, space, batch_size=batch).pooled
    file = cache / f"{space.space}-{fingerprint([space.digest, images.digest()])[:16]}.npy"
    with closing(wait_for(cache, f"{file.stem}.lock")):
        if not file.is_file():
            with replacing(file) as temporary, temporary.open("wb") as stream:
                np.save(stream, collect(images, space, batch_size=batch).pooled.numpy())
        return torch.from_numpy(read_npy(file))


class Teacher:
    """The encoder of a run's dataset, with the tokens of the training images."""

    def __init__(self, dataset: Path, device: torch.device, batch: int) -> None:
        self.data = PackedDataset(dataset)
        info = self.data.manifest.encoders[0]
        self.device, self.batch = device, batch
        encoder = load_teacher(info.name, info.grid).to(device)
        self.reader = Extractor(info.name, "", lambda pixels: features.Features(encoder(pixels).class_token), device)
        count = len(self.data)
        rows = torch.arange(count)
        shards = range(len(self.data.manifest.shards))
        tokens = np.concatenate([self.data.records(number, "class_token.0") for number in shards])
        self.tokens = torch.from_numpy(tokens).float()
        labels = torch.from_numpy(self.data.labels())
        means = [self.tokens[labels == c].mean(0) for c in range(len(self.data.manifest.classes))]
        self.class_means = torch.stack(means) if len(means) > 1 else None
        self.some = rows[:: max(count // CKNNA_IMAGES, 1)][:CKNNA_IMAGES]
        self.targets = read_targets(self.data, self.some, None, 256, device)

    def read(self, pixels: Tensor) -> Tensor:
        """The encoder's class tokens (N, D) of uint8 images."""
        return torch.cat([self.reader(part).pooled.float().cpu() for part in pixels.split(self.batch)])

    def tokens_of(self, samples: Samples) -> dict[str, float]:
        """Generated class tokens against the encoder's: of their own images, and of the training images as a set."""
        if samples.token is None:
            return {}
        names = ("token_cosine", "token_cosine_shuffled", "token_retrieval", "token_class_agreement")
        numbers = token_metrics(samples.token, self.read(samples.pixels), self.class_means)
        found = {name: number.value for name, number in zip(names, numbers) if number is not None}
        return found | {"token_fd": self.distance(samples.token)}

    def distance(self, tokens: Tensor) -> float:
        """Frechet distance of class tokens to those of the training images."""
        return frechet_distance(compute_statistics(self.tokens), compute_statistics(tokens))

    def layers(self, network: SiT, info: ModelInfo) -> dict[str, float]:
        """CKNNA of each block's mean patch token with the encoder's, at t = 0.5; the largest over the blocks."""
        settings = CknnaConfig(checkpoint=Path(), dataset=Path(), times=(CKNNA_TIME,), neighbours=NEIGHBOURS)
        found = measure(Model(Path(), network, info, None), self.data, self.some, self.targets, settings)
        scores = {"cknna": max(found.patch_tokens[0])}
        if found.denoised_cknna is not None and found.denoised_cosine is not None:
            scores |= {
                "token_denoised_cknna": found.denoised_cknna[0],
                "token_denoised_cosine": found.denoised_cosine[0],
            }
        return scores


def reconstructions(autoencoder: Autoencoder, pixels: Tensor, batch: int) -> Tensor:
    """Images through the VAE and back: (N, 3, H, W) uint8 => the same, from the mean of the posterior."""

    device = next(autoencoder.parameters()).device

    def through(part: Tensor) -> Tensor:
        mean = autoencoder.encode(part.to(device)).chunk(2, dim=1)[0]
        return autoencoder.decode(autoencoder.normalization.normalize(mean)).cpu()

    return torch.cat([through(part) for part in pixels.split(batch)])


def floors(judge: Judge, autoencoder: Autoencoder, held_out: Path) -> dict[str, dict[str, float]]:
    """What real images reach: all that were held out, more or fewer than the samples of a row, and these through the VAE."""
    images = open_images([held_out])
    pixels = torch.from_numpy(np.array(images.read(0, len(images)))).permute(0, 3, 1, 2)
    label = None if images.labels is None else torch.from_numpy(images.labels)
    through = reconstructions(autoencoder, pixels, judge.batch)
    error = (pixels.float() - through.float()).square().mean().item()
    psnr = {"psnr": 10 * math.log10(255**2 / error)} if error else {}
    return {"held-out": judge.images(pixels, label), "reconstructions": judge.images(through, label) | psnr}


def oracle(teacher: Teacher, held_out: Path) -> dict[str, float]:
    """The class tokens that the encoder itself gives held-out images: what perfect generated tokens would reach."""
    images = open_images([held_out])
    pixels = torch.from_numpy(np.array(images.read(0, len(images)))).permute(0, 3, 1, 2)
    tokens = teacher.read(pixels)
    found = {"token_fd": teacher.distance(tokens)}
    if teacher.class_means is not None and images.labels is not None:
        hits = nearest_class(tokens, teacher.class_means) == torch.from_numpy(images.labels)
        found["token_class_accuracy"] = hits.double().mean().item()
    return found

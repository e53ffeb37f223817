"""The training steps that benchmarks compare: ours, and the published code's as its train.py runs it."""

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torchvision.transforms import Normalize

from benchmarks import published
from dataset import Batch
from loss import Objective
from models import acceleration
from models.autoencoder import LatentNormalization
from models.ema import EMA
from models.encoder import PUBLISHED, VisionEncoder
from models.sit import SiT, SiTConfig
from packed.format import MOMENTS_STD_SCALE
from training.graph import GraphedStep
from training.step import StepResult, TrainStep

CACHED = "cached"  # in place of an encoder: tokens are given


class Data(NamedTuple):
    """Random inputs, the same for all. moments: (N, 8, h, h) mean and std, float32. label: (N,). pixels: (N, S, S, 3)
    uint8 or None. tokens: (N, T, E) float32, class token first."""

    moments: Tensor
    label: Tensor
    pixels: Tensor | None
    tokens: Tensor


def random_data(config: SiTConfig, n: int, device: str, encoder: str) -> Data:
    """Random inputs that depend on nothing but the shapes."""
    g = torch.Generator().manual_seed(0)
    moments = torch.randn(n, 2 * config.in_channels, config.input_size, config.input_size, generator=g)
    moments[:, config.in_channels :] = moments[:, config.in_channels :].abs() * 0.1 + 0.01
    tokens = torch.randn(n, config.num_patches + 1, config.class_token_dim or 768, generator=g)
    side = 8 * config.input_size
    pixels = torch.randint(0, 256, (n, side, side, 3), dtype=torch.uint8, generator=g) if encoder != CACHED else None
    label = torch.randint(0, config.num_classes, (n,), generator=g)
    return Data(moments.to(device), label.to(device), None if pixels is None else pixels.to(device), tokens.to(device))


def random_encoder(name: str, config: SiTConfig, device: str) -> VisionEncoder:
    """A vision encoder of the named architecture with random weights; its grid is that of the network's patches."""
    grid = config.input_size // config.patch_size
    vit = timm.create_model(PUBLISHED.get(name, name), pretrained=False, num_classes=0, img_size=14 * grid)
    if vit.num_features not in config.align_dims or vit.patch_embed.patch_size[0] != 14:
        raise ValueError(f"--encoder {name}: tokens of width {config.align_dims} from 14 x 14 patches are needed")
    return VisionEncoder(vit, name, grid).to(device)


class OurStep:
    """A step of training.step.TrainStep on fixed data, as train.py builds it; call it to take the next one."""

    def __init__(
        self,
        config: SiTConfig,
        n: int,
        device: str,
        *,
        encoder: str = CACHED,
        precision: str = "fp32",
        compiled: bool = False,
        norm_kernel: bool = False,
        graph: bool = False,
        gradient_checkpointing: bool = False,
    ) -> None:
        torch.manual_seed(0)
        with torch.device(device):
            network, average = SiT(config).train(), SiT(config)
        network.gradient_checkpointing = gradient_checkpointing
        encoders = [] if encoder == CACHED else [random_encoder(encoder, config, device)]
        if compiled:
            acceleration.compile_network(network, norm_kernel=norm_kernel)
            for module in encoders:
                acceleration.compile_encoder(module)
        make = GraphedStep if graph else TrainStep
        self.step = make(
            network,
            Objective(),
            torch.optim.AdamW(network.parameters(), lr=1e-4, weight_decay=0.0, fused=True),
            EMA(network, average),
            LatentNormalization(),
            encoders=encoders,
            precision=precision,
            scaler=torch.amp.GradScaler(torch.device(device).type) if precision == "fp16" else None,
            compiled=compiled,
        )
        d = random_data(config, n, device, encoder)
        stored = d.moments.clone()
        stored[:, config.in_channels :] *= MOMENTS_STD_SCALE
        tokens = ((d.tokens[:, 0].half(),), (d.tokens[:, 1:].half(),)) if encoder == CACHED else ((), ())
        self.positions = torch.arange(n, device=device)
        self.batch = Batch(stored.half(), d.label, self.positions, d.pixels, *tokens)
        self.number = 0

    def __call__(self, batch: Batch | None = None) -> StepResult:
        self.number += 1
        return self.step(self.number - 1, [(self.batch if batch is None else batch, self.positions)])


def encoded_ahead(ours: OurStep) -> Callable[[], StepResult]:
    """The same step with the next batch encoded on a side stream while this one trains (CUDA)."""
    encoder, ours.step.encoders = ours.step.encoders[0], ()  # the step finds its tokens as if they were cached
    main, side = torch.cuda.current_stream(), torch.cuda.Stream()
    pixels = ours.batch.pixels
    assert pixels is not None, "an encoder in the step reads pixels"

    def encode() -> Batch:
        side.wait_stream(main)
        with torch.cuda.stream(side), acceleration.autocast("cuda", ours.step.precision):
            tokens = encoder(pixels.permute(0, 3, 1, 2))
        return ours.batch._replace(class_token=(tokens.class_token,), patch_tokens=(tokens.patch_tokens,))

    ahead = [encode()]

    def step() -> StepResult:
        main.wait_stream(side)
        current = ahead.pop()
        for tensor in (*current.class_token, *current.patch_tokens):
            tensor.record_stream(main)
        ahead.append(encode())
        return ours(current)

    return step


def published_step(
    clone: Path,
    config: SiTConfig,
    n: int,
    device: str,
    *,
    encoder: str = CACHED,
    precision: str = "fp32",
    read_back: bool,
) -> Callable[[], None]:
    """The body of the published training loop with its own functions, on one process and without its launcher.

    The encoder is ours (timm's attention is fused, the one it downloads is not): its time is not what is compared.
    """
    given = {
        "torch": torch,
        "OrderedDict": OrderedDict,
        "Normalize": Normalize,
        "IMAGENET_DEFAULT_MEAN": IMAGENET_DEFAULT_MEAN,
        "IMAGENET_DEFAULT_STD": IMAGENET_DEFAULT_STD,
    }
    names = ("update_ema", "sample_posterior", "preprocess_raw_image")
    theirs = published.functions(clone, "train.py", names, given)
    network_class = published.module(clone, "models/sit.py").SiT
    torch.manual_seed(0)
    with torch.device(device):
        network, ema = (network_class(**published.network_arguments(config)) for _ in range(2))
    network.train()
    ema.eval().requires_grad_(False)
    objective = published.module(clone, "loss.py").SILoss()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, weight_decay=0.0)
    scaler = torch.amp.GradScaler(torch.device(device).type, enabled=precision == "fp16")
    vit = None if encoder == CACHED else random_encoder(encoder, config, device).vit
    d = random_data(config, n, device, encoder)
    raw = None if d.pixels is None else d.pixels.permute(0, 3, 1, 2).contiguous()
    scale = torch.full((1, 4, 1, 1), LatentNormalization().scale[0], device=device)

    def forward(*args: Any, **kwargs: Any) -> Any:
        """As accelerate wraps a network: autocast inside, float32 outside."""
        with acceleration.autocast(device, precision):
            velocity, projections, class_velocity = network(*args, **kwargs)
        return velocity.float(), [z.float() for z in projections], class_velocity.float()

    def step() -> None:
        latent = theirs["sample_posterior"](d.moments, latents_scale=scale)
        tokens = d.tokens
        if vit is not None:
            with torch.no_grad(), acceleration.autocast(device, precision):
                tokens = vit.forward_features(theirs["preprocess_raw_image"](raw, "dinov2"))
        velocity, projection, _, _, class_velocity = objective(
            forward, latent, {"y": d.label}, zs=[tokens], cls_token=tokens[:, 0]
        )
        terms = [velocity.mean(), projection.mean() * 0.5, class_velocity.mean() * 0.03]
        loss = sum(terms)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        theirs["update_ema"](ema, network)
        if read_back:
            for value in (loss, *terms, norm):
                value.detach().item()

    return step

"""Three small networks, trained in a minute each on the training digits and saved in the formats that `--vae`,
`--enc-type` and `--classifier` load anywhere: `python -m quickstart.toy_networks vae|encoder|judge IMAGES OUT`.

vae: an AutoencoderKL, 16 x 16 pixels (or 32, or 64) to 8 x 8 x 4 latents. encoder: a ViT with class token, the stand-in
for DINOv2. judge: a ResNet that recognises digits and takes no part in generation; it only evaluates. They train on the GPU
where there is one.
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.files import write_json
from common.processes import Processes
from common.reporting import progress, say
from quickstart.digits import read_image_folder

RESNET = {"channels": [16, 32, 64, 64], "layers": [1, 1, 1, 1], "stem_width": 16}
STEPS = {"vae": 400, "encoder": 600, "judge": 600}
MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


def vit(size: int, grid: int = 4) -> dict[str, int]:
    """The encoder's shape: grid x grid patches of images of `size` pixels."""
    return {"img_size": size, "patch_size": size // grid, "embed_dim": 96, "depth": 4, "num_heads": 4}


def batches(images: Tensor, labels: Tensor, steps: int, size: int, shift: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Random batches of [-1, 1] images (size, 3, H, W), each image moved by up to `shift` pixels, and labels."""
    generator = torch.Generator().manual_seed(0)
    padded = F.pad(images, [shift] * 4, mode="replicate")
    with progress(steps, unit="step") as bar:
        for _ in range(steps):
            rows = torch.randint(len(images), (size,), generator=generator)
            dx, dy = torch.randint(2 * shift + 1, (2,), generator=generator).tolist()
            yield padded[rows, :, dy : dy + images.shape[2], dx : dx + images.shape[3]], labels[rows]
            bar.update()


def fit(
    network: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], images: Tensor, labels: Tensor, *, steps: int
) -> None:
    """AdamW with a cosine decay to zero, batches of 64 images moved by up to a pixel."""
    lr = 2e-3
    optimizer = torch.optim.AdamW(network.parameters(), lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.05)
    network.train()
    for x, y in batches(images, labels, steps, size=64, shift=1):
        optimizer.zero_grad()
        loss(x, y).backward()
        optimizer.step()
        schedule.step()
    network.eval()


def train_vae(
    images: Tensor, labels: Tensor, out: Path, *, steps: int, side: int = 8, width: int = 16
) -> dict[str, float]:
    """Reconstruction and a slight KL term; the scaling factor is 1 / std of the latents, as for SD-VAE.

    Args:
        images: (N, 3, H, W) in [-1, 1].
        labels: (N,).
        out: folder to write.
        steps: of training.
        side: latents are side x side x 4.
        width: channels at the image's resolution; the lower ones have twice as many.
    """
    from diffusers import AutoencoderKL

    size = images.shape[-1]
    blocks = (size // side).bit_length()  # each but the last halves the image
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=(width, *(2 * width,) * (blocks - 1)),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=size,
        mid_block_add_attention=False,
    ).to(images.device)

    def loss(x: Tensor, _: Tensor) -> Tensor:
        posterior = vae.encode(x).latent_dist
        z = posterior.mean + posterior.std * torch.randn_like(posterior.std)
        return F.mse_loss(vae.decode(z).sample, x) + 1e-4 * posterior.kl().mean() / (4 * side**2)

    fit(vae, loss, images, labels, steps=steps)
    with torch.no_grad():
        parts = images[:5000].split(1500)
        latents = torch.cat([vae.encode(part).latent_dist.mean for part in parts])
        back = torch.cat([vae.decode(part).sample for part in latents.split(1500)])
        error = F.mse_loss(back, images[:5000])
    vae.cpu().register_to_config(scaling_factor=1 / latents.std().item())
    vae.save_pretrained(out)
    return {"reconstruction_psnr": 10 * torch.log10(4 / error).item(), "latent_std": latents.std().item()}


def train_classifier(
    architecture: str, model_args: dict, images: Tensor, labels: Tensor, out: Path, *, steps: int
) -> dict:
    """A timm network on digits moved by up to a pixel, saved in timm's own folder format."""
    import timm
    from timm.models import save_for_hf

    network = timm.create_model(architecture, num_classes=10, **model_args).to(images.device)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(network(x), y, label_smoothing=0.1)

    fit(network, loss, images, labels, steps=steps)
    network.pretrained_cfg.update(
        mean=MEAN, std=STD, input_size=tuple(images.shape[1:]), interpolation="bicubic", crop_pct=1.0, num_classes=10
    )
    with torch.no_grad():
        accuracy = (network(images[:5000]).argmax(1) == labels[:5000]).float().mean().item()
    save_for_hf(network.cpu(), out, model_args=model_args)
    return {"train_accuracy": accuracy}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("network", choices=("vae", "encoder", "judge"))
    parser.add_argument("images", type=Path, help="class-folder tree to train on")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--steps", type=int, metavar="N", help=f"training steps (default: {STEPS})")
    parser.add_argument(
        "--grid", type=int, default=4, metavar="N", help="encoder: N x N patches; VAE: 2 N x 2 N latents"
    )
    parser.add_argument("--width", type=int, default=16, metavar="C", help="channels of the VAE at the full resolution")
    settings = parser.parse_args()
    device = Processes().device
    pixels, labels = (torch.from_numpy(part).to(device) for part in read_image_folder(settings.images))
    images = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
    torch.manual_seed(0)
    settings.out.mkdir(parents=True, exist_ok=True)
    steps, out = settings.steps or STEPS[settings.network], settings.out
    if settings.network == "vae":
        figures = train_vae(images, labels, out, steps=steps, side=2 * settings.grid, width=settings.width)
    elif settings.network == "encoder":
        shape = vit(images.shape[-1], settings.grid)
        figures = train_classifier("vit_tiny_patch16_224", shape, images, labels, out, steps=steps)
    else:
        figures = train_classifier("resnet18", RESNET, images, labels, out, steps=steps)
    write_json(settings.out / "figures.json", figures)
    figures_text = ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in figures.items())
    say(f"{settings.network}: {figures_text}")


if __name__ == "__main__":
    main()

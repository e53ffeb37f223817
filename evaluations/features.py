"""Images to features: the Inception network of FID, DINOv2, CLIP, or any network of timm.

An extractor takes uint8 pixels (N, 3, H, W) of any size and gives `Features`. Nothing here is trained.
"""

import hashlib
import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from config import MissingFile, UserError
from models import hub

# the 2015 network, converted; torch-fidelity and pytorch-fid publish the same file under two names
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
INCEPTION_FILES = ("weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth")
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILES[0]}"
_FLAG = "--inception-weights FILE"
SPATIAL_CHANNELS = 7  # ADM keeps the first 7 channels of mixed_6/conv

DINOV2 = "vit_large_patch14_dinov2.lvd142m"  # edm2 and dgm-eval measure FD-DINOv2 with ViT-L/14 at 224
CLIP = "vit_large_patch14_clip_quickgelu_336.openai"  # CMMD


class Features(NamedTuple):
    """pooled (N, D); spatial (N, S), for sFID; logits (N, K), for the Inception Score or a classifier."""

    pooled: torch.Tensor
    spatial: torch.Tensor | None = None
    logits: torch.Tensor | None = None


@dataclass(frozen=True)
class Extractor:
    """A network that computes features. `space` names it in results, `digest` identifies the weights (hex SHA-256)."""

    space: str
    digest: str
    compute: Callable[[torch.Tensor], Features]
    device: torch.device
    classes: int = 0

    def __call__(self, pixels: torch.Tensor) -> Features:
        """uint8 pixels (N, 3, H, W) -> Features in the extractor's dtype."""
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[1] != 3:
            raise UserError(f"expected uint8 images (N, 3, H, W), got {pixels.dtype} {tuple(pixels.shape)}")
        with torch.inference_mode():
            return self.compute(pixels.to(self.device))


def load(
    spec: str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    inception_weights: Path | None = None,
    inception_sha256: str = INCEPTION_SHA256,
) -> Extractor:
    """An extractor by name.

    Args:
        spec: inception, dinov2, clip (the last two also as NAME=FILE_OR_FOLDER), or timm:NAME_OR_FOLDER.
        device: where it computes.
        dtype: in which precision.
        inception_weights, inception_sha256: see `load_inception`.

    Raises:
        MissingFile: weights are absent.
        UserError: the name is unknown, or the weights do not fit.
    """
    kind, _, weights = spec.partition("=")
    if kind == "inception" and not weights:
        return load_inception(inception_weights, sha256=inception_sha256, device=device, dtype=dtype)
    if kind == "dinov2":
        network = _timm_network(weights or DINOV2, "dinov2=", DINOV2)
        _position_like_dinov2(network, 224)
        return _extractor("dinov2", network, 224, device, dtype)
    if kind == "clip":
        network = _timm_network(weights or CLIP, "clip=", CLIP)
        return _extractor("clip", network, 336, device, dtype, antialias=False, embed=network)
    if spec.startswith("timm:") and spec != "timm:":
        return load_timm(spec.removeprefix("timm:"), device=device, dtype=dtype)
    raise UserError(f"unknown features {spec!r}: give inception, dinov2, clip or timm:NAME_OR_FOLDER")


def load_inception(
    path: Path | None = None,
    *,
    sha256: str = INCEPTION_SHA256,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Extractor:
    """torch-fidelity's Inception (2015 weights, TensorFlow 1's resize to 299): pool_3, mixed_6/conv and logits.

    Args:
        path: the weights; default: torch's hub cache, filled by a download when it is empty.
        sha256: expected SHA-256 of the file, or "any".
        device: where it computes.
        dtype: in which precision.

    Raises:
        MissingFile: there are no weights.
        UserError: the file holds something else.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    path = _find_inception() if path is None else Path(path)
    state, digest = _read_inception(path, sha256)
    # Its constructor unpickles without restriction: it gets a new file of plain tensors, never the given one.
    clean = io.BytesIO()
    torch.save(state, clean)
    clean.seek(0)
    try:
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=clean)
    except RuntimeError as error:
        raise UserError(f"{path} does not hold the weights of the 2015 Inception: {_first_line(error)}") from error
    network = network.to(device, dtype).eval()
    network.feature_extractor_internal_dtype = dtype
    caught: dict[str, torch.Tensor] = {}
    network.Mixed_6d.branch1x1.register_forward_hook(lambda _, __, out: caught.update(spatial=out))
    network.AvgPool.register_forward_hook(lambda _, __, out: caught.update(pooled=out))

    def compute(pixels: torch.Tensor) -> Features:
        network(pixels)
        pooled = caught.pop("pooled").flatten(1)
        # TensorFlow's layout is NHWC: rows, then columns, then channels
        spatial = caught.pop("spatial")[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        return Features(pooled, spatial, pooled @ network.fc.weight.T)  # ADM's logits leave the bias out

    return Extractor("inception", digest, compute, torch.device(device), classes=len(network.fc.weight))


def load_timm(
    source: str, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, classifier: bool = False
) -> Extractor:
    """Any timm network: features before the head, of whole images resized (bicubic, antialias) to its input size.

    Args:
        source: a name of timm's, or a local folder (config.json and model.safetensors).
        device: where it computes.
        dtype: in which precision.
        classifier: whether a head is required.
    """
    network = _timm_network(source)
    config = network.pretrained_cfg
    channels, height, width = config["input_size"]
    if height != width or channels not in (1, 3):
        raise UserError(f"timm network {source} takes {channels} x {height} x {width}; square RGB or grey is needed")
    if classifier and not getattr(network, "num_classes", 0):
        raise UserError(f"timm network {source} has no classification head (num_classes 0)")
    folder = Path(source).expanduser()
    return _extractor(folder.name if folder.is_dir() else source, network, height, device, dtype)


def _extractor(
    space: str,
    network: nn.Module,
    size: int,
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    antialias: bool = True,
    embed: Callable | None = None,
) -> Extractor:
    """An extractor of a timm network on images of `size` pixels; `embed`: what computes the features, if not its body."""
    digest = _digest(network)
    config = network.pretrained_cfg
    mean, std = (torch.tensor(config[key], dtype=torch.float64).view(-1, 1, 1) for key in ("mean", "std"))
    network = network.to(device, dtype).eval().requires_grad_(False)

    def compute(pixels: torch.Tensor) -> Features:
        x = pixels.to(dtype)
        if x.shape[-2:] != (size, size):
            x = F.interpolate(x, size=(size, size), mode="bicubic", antialias=antialias)
        if config["input_size"][0] == 1:  # a network for grey images
            x = x.mean(1, keepdim=True)
        x = (x / 255 - mean.to(x)) / std.to(x)
        if embed is not None:
            return Features(embed(x))
        features = network.forward_features(x)
        pooled = network.forward_head(features, pre_logits=True).flatten(1)
        return Features(pooled, logits=network.forward_head(features) if network.num_classes else None)

    return Extractor(space, digest, compute, torch.device(device), classes=network.num_classes)


def _timm_network(source: str, prefix: str = "timm:", architecture: str | None = None) -> nn.Module:
    """A pretrained network of timm.

    Args:
        source: a name of timm's, or a local folder; with `architecture` also a checkpoint file of it.
        prefix: start of the flag's value that names a folder, for the advice in the error.
        architecture: a name of timm's.
    """
    import timm

    path = Path(source).expanduser()
    if source.startswith(("/", "./", "../", "~")) and not path.exists():
        raise MissingFile(f"{source} does not exist (a folder with config.json and model.safetensors is expected)")
    try:
        if path.is_dir():
            return timm.create_model(f"local-dir:{path}", pretrained=True)
        if architecture is not None and path.is_file():
            return timm.create_model(architecture, pretrained=True, pretrained_cfg_overlay={"file": str(path)})
        return timm.create_model(source, pretrained=True)
    except OSError as error:
        if path.exists():
            raise MissingFile(f"{path} cannot be read as a timm network: {_first_line(error)}") from error
        repo = hub.timm_repository(source)
        elsewhere = f"`hf download {repo} --local-dir FOLDER` and give {prefix}FOLDER"
        raise MissingFile(f"the weights of {source} are missing: {hub.cause(error, repo, elsewhere)}") from error
    except (RuntimeError, KeyError, TypeError, pickle.UnpicklingError) as error:
        raise UserError(f"timm network {source} cannot be loaded: {_first_line(error)}") from error


def _position_like_dinov2(network: nn.Module, size: int) -> None:
    """Resample the position embedding as DINOv2's own code: bicubic by the factor (new + 0.1) / old, no antialias.

    timm resamples with antialias, which is another function; FD-DINOv2 is defined with the former.
    """
    old, position = network.patch_embed.grid_size[0], network.pos_embed.detach().clone()
    new = size // network.patch_embed.patch_size[0]
    if old == new:
        return
    network.set_input_size(img_size=(size, size))
    prefix = position.shape[1] - old * old
    grid = position[:, prefix:].reshape(1, old, old, -1).permute(0, 3, 1, 2)
    factor = (new + 0.1) / old
    grid = F.interpolate(grid, scale_factor=(factor, factor), mode="bicubic").permute(0, 2, 3, 1).flatten(1, 2)
    network.pos_embed = nn.Parameter(torch.cat([position[:, :prefix], grid], dim=1), requires_grad=False)


def _find_inception() -> Path:
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    if not folder.is_absolute():  # ~ where there is no home folder
        raise MissingFile(f"no home folder, so no cache of Inception weights: get {INCEPTION_URL} and give {_FLAG}")
    for name in INCEPTION_FILES:
        if (folder / name).is_file():
            return folder / name
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / INCEPTION_FILES[0]
    try:
        torch.hub.download_url_to_file(INCEPTION_URL, str(target), hash_prefix=INCEPTION_SHA256, progress=False)
    except (OSError, RuntimeError) as error:
        raise MissingFile(
            f"the Inception weights are not in {folder} and cannot be downloaded ({_first_line(error)}); get "
            f"{INCEPTION_URL} on a machine with network and give {_FLAG}"
        ) from error
    return target


def _read_inception(path: Path, sha256: str) -> tuple[dict[str, torch.Tensor], str]:
    if not path.is_file():
        raise MissingFile(f"Inception weights {path} do not exist")
    data = path.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if sha256 not in ("any", digest):
        raise UserError(
            f"{path} has SHA-256 {digest}, not {sha256}: it is damaged or another network; numbers of "
            "other weights cannot be called FID (to use them all the same: --inception-sha256 any)"
        )
    try:
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise UserError(f"{path} is not a file of weights: {_first_line(error)}") from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"{path} does not hold a state dict")
    return state, digest


def _digest(network: nn.Module) -> str:
    """SHA-256 of names, types, shapes and values of the weights, whichever file they came from.

    It is part of recorded protocols and of the keys of the cache: this definition must not change.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__).strip().rstrip(".")

"""Convert published checkpoints (REG, REPA, SiT) to model files and back.

python convert.py --source last.pt --out reg-xl2.safetensors
python convert.py --to published --source runs/reg-b2 --out reg-b2.pt
"""

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from common.reporting import run, say
from config import parse, setting
from models.choices import PATHS

LACKING = "what the .pt lacks"  # a heading of --help


@dataclass(frozen=True)
class ConvertConfig:
    source: Path = setting(
        help="a published .pt or hub OWNER/NAME[/FILE]; with --to published a model file, checkpoint or run",
        group="files",
    )
    out: Path = setting(help="file to write", group="files")
    to: str = setting("ours", "direction of the conversion", group="files", choices=("ours", "published"))
    weights: str = setting("ema", "which weights of a .pt are taken", group="files", choices=("ema", "model"))

    num_heads: int | None = setting(None, "attention heads; default: by its args or width", at_least=1, group=LACKING)
    encoder_depth: int | None = setting(None, "aligned block; default: by its args or depth", group=LACKING)
    path_type: str | None = setting(None, "interpolant; default: by its args, or linear", group=LACKING, choices=PATHS)
    cfg_prob: float | None = setting(None, "label dropout; default: 0.1", group=LACKING, at_least=0, at_most=1)
    resolution: int | None = setting(None, "pixels; default: by its args, or 8 per latent pixel", group=LACKING)
    vae: str = setting("ema", "VAE of the latents: ema, mse, hub id or folder", group=LACKING)
    enc_type: tuple[str, ...] = setting((), "encoders; default: by its args", group=LACKING)
    licence: str | None = setting(None, "of the weights, e.g. mit; default: by its args", group=LACKING)
    family: str | None = setting(
        None,
        "whose code trained a SiT without alignment and class token; default: by its args and its output layer",
        group=LACKING,
        choices=("sit", "repa"),
    )


EXAMPLES = (
    "python convert.py --source last.pt --out reg-xl2.safetensors",
    "python convert.py --to published --source runs/reg-b2 --out reg-b2.pt",
)


def main(argv: list[str] | None = None) -> None:
    settings = parse(ConvertConfig, "Convert published checkpoints to model files and back.", argv, examples=EXAMPLES)
    from common.lock import claim_file
    from models.obtain import describe, locate, obtain
    from models.published import Given, export_published, import_published

    with closing(claim_file(settings.out)):
        if settings.to == "published":
            info = export_published(obtain(settings.source), settings.out)
        else:
            given = {name: getattr(settings, name) for name in Given.__dataclass_fields__}
            info = import_published(locate(settings.source).path, settings.out, settings.weights, Given(**given))
    say(f"{settings.out}: {describe(info)}")


if __name__ == "__main__":
    run(main)

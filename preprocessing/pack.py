"""Pack images for training: crop, VAE moments, encoder tokens or pixels => a packed dataset (see dataset.py, docs/data.md).

    torchrun --nproc_per_node=8 -m preprocessing.pack --source ILSVRC2012_img_train.tar --out data/imagenet256

The same command again finishes what was interrupted.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__" and not __package__:  # run as a file: start again as a module that finds ours
    os.environ["PYTHONPATH"] = f"{Path(__file__).parents[1]}:{os.environ.get('PYTHONPATH', '')}"
    os.execv(sys.executable, [sys.executable, "-P", "-m", "preprocessing.pack", *sys.argv[1:]])

from common.reporting import run
from config import UserError, parse
from preprocessing.settings import PackConfig

EXAMPLES = (
    "python -m preprocessing.pack --source images --out data/mine --resolution 256",
    "torchrun --nproc_per_node=8 -m preprocessing.pack --source ILSVRC2012_img_train.tar --out data/imagenet256",
    "python -m preprocessing.pack --out data/mine --verify",
)


def main(argv: Sequence[str] | None = None) -> None:
    settings = parse(PackConfig, "Pack images for training.", argv, examples=EXAMPLES)
    if settings.extend and (settings.verify or settings.repair):
        raise UserError("--extend goes with neither --verify nor --repair; verify and repair first, then extend")
    if settings.out.exists() and not settings.out.is_dir():
        raise UserError(f"--out {settings.out}: is a file; give a folder")
    if (settings.verify or settings.repair) and not settings.out.is_dir():
        raise UserError(f"--out {settings.out}: no such folder")
    if settings.verify:
        from preprocessing.verify import verify

        verify(settings.out)
    elif settings.images:
        from preprocessing.packing import pack

        pack(settings)


if __name__ == "__main__":
    run(main, "use a smaller --batch-size")

"""An epoch of train.py on a packed dataset: how much of a step is spent waiting for data.

python -m benchmarks.epoch --data-dir data/cifar10
"""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from common.reporting import run
from config import parse, setting


@dataclass(frozen=True)
class EpochBenchmark:
    data_dir: Path = setting(help="packed dataset (preprocessing.pack)", group="what")
    enc_type: tuple[str, ...] = setting(
        (), "encoders to run in the step, if tokens are not in the dataset", group="what"
    )
    model: str = setting("SiT-S/2", "network, as of train.py", group="what")
    depth: int = setting(4, "its blocks", group="what")
    hidden_size: int = setting(128, "its width", group="what")
    num_heads: int = setting(4, "its attention heads", group="what")
    batch_size: int = setting(100, "images per step", group="what")
    mixed_precision: str = setting("fp32", "arithmetic", group="what", choices=("fp32", "fp16", "bf16"))
    num_workers: int = setting(2, "reading threads", group="how")
    intervals: int = setting(10, "stretches of the epoch to measure", group="how")
    label: str = setting("run", "names the result files", group="how")


def main(argv: Sequence[str] | None = None) -> None:
    settings = parse(EpochBenchmark, (__doc__ or "").splitlines()[0], argv)
    import train
    from benchmarks import harness
    from packed.format import read_manifest

    manifest = read_manifest(settings.data_dir)
    steps = manifest.count // settings.batch_size
    every = max(1, steps // settings.intervals)
    with tempfile.TemporaryDirectory() as folder:
        train.main(
            [
                "--data-dir",
                str(settings.data_dir),
                "--output-dir",
                folder,
                "--exp-name",
                "epoch",
                "--model",
                settings.model,
                "--depth",
                str(settings.depth),
                "--hidden-size",
                str(settings.hidden_size),
                "--num-heads",
                str(settings.num_heads),
                "--encoder-depth",
                str(settings.depth // 2),
                "--projector-dim",
                str(2 * settings.hidden_size),
                "--batch-size",
                str(settings.batch_size),
                "--max-train-steps",
                str(steps),
                "--mixed-precision",
                settings.mixed_precision,
                "--num-workers",
                str(settings.num_workers),
                "--sampling-steps",
                "0",
                "--log-every",
                str(every),
                *(["--enc-type", *settings.enc_type] if settings.enc_type else []),
            ]
        )
        lines = [
            json.loads(line) for line in (Path(folder) / "epoch/metrics.jsonl").read_text(encoding="utf-8").splitlines()
        ]
    lines = lines[1:] or lines  # the first interval also starts up
    row = {
        "tokens": "cached" if manifest.encoders else "computed in the step",
        "steps": steps,
        "ms per step": harness.spread([1000 * settings.batch_size / line["images_per_second"] for line in lines]),
        "waiting for data %": harness.spread([100 * line["data_wait"] for line in lines]),
    }
    shown = {k: v for k, v in asdict(settings).items() if k not in ("data_dir", "enc_type", "label")}
    print(harness.write("epoch", settings.label, {"data": settings.data_dir.name, **shown}, [row]))


if __name__ == "__main__":
    run(main)

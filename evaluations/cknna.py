"""CKNNA between the layers of a network and an encoder: do its tokens order images as DINOv2 does?

`python -m evaluations.cknna --checkpoint RUN --dataset PACKED` takes noisy latents and class tokens through the network
at several times t and compares, after every block, the mean patch token with the encoder's mean patch token and the
class token with the encoder's class token; also the denoised class token with the clean one (REG, analysis section).
"""

if not __package__:  # run as a file
    __import__("script")  # starts it again as a module

from contextlib import closing

from common.reporting import run, say
from config import parse
from evaluations.settings import CknnaConfig

EXAMPLES = (
    "python -m evaluations.cknna --checkpoint runs/reg-b2 --dataset data/imagenet256 --out runs/reg-b2/cknna.json",
    "python -m evaluations.cknna --checkpoint runs/mine --dataset data/mine --num-images 1000 --times 0.3 0.7",
)


def main() -> None:
    settings = parse(CknnaConfig, "CKNNA between the layers of a network and its encoder.", examples=EXAMPLES)
    from common.lock import claim_file
    from evaluations.results import check_writable

    check_writable(settings.out)
    with closing(claim_file(settings.out)):
        _measure(settings)


def _measure(settings: CknnaConfig) -> None:
    import torch

    from common.files import write_json
    from common.processes import Processes
    from dataset import PackedDataset
    from evaluations.layers import measure, plot, read_targets
    from models.model_file import load_model
    from models.obtain import obtain

    device = Processes(settings.device).device
    checkpoint = obtain(settings.checkpoint)
    model = load_model(checkpoint, device)
    data = PackedDataset(settings.dataset)
    count = min(settings.num_images, len(data))
    rows = torch.arange(count) * len(data) // count
    encoder = settings.encoder or (model.info.encoders[0] if model.info.encoders else None)
    targets = read_targets(data, rows, encoder, settings.batch_size, device)
    alignment = measure(model, data, rows, targets, settings)
    content = {
        "schema": 1,
        "checkpoint": str(checkpoint),
        "step": model.info.step,
        "n": count,
        "dataset": str(settings.dataset),
        "k": settings.neighbours,
        "seed": settings.seed,
        **alignment._asdict(),
    }
    picture = settings.out.with_suffix(".png")
    write_json(settings.out, content)
    plot(picture, alignment)
    for t, row in zip(alignment.times, alignment.patch_tokens):
        best = max(range(len(row)), key=row.__getitem__)
        say(f"t = {t:g}: patch tokens reach CKNNA {row[best]:.3f} after block {alignment.layers[best]}")
    say(f"wrote {settings.out} and {picture}")


if __name__ == "__main__":
    run(main)

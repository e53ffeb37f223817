"""Fine-tune a model of some classes to other classes with few images: before, after, and from scratch, step by step.

python -m benchmarks.finetune --out runs/finetune            # digits: a model of 0 to 6 to 7, 8 and 9, 100 images each
python -m benchmarks.finetune --out runs/places --images IMAGES --vae VAE --encoder ENCODER --judge JUDGE --resolution 64 \
    --new Pasture PermanentCrop Residential --recipe recipes/study/eurosat-finetune.yaml --label eurosat

The same command goes on where it was cut; several at once share the work where each has its own
--seeds, and the command with all seeds then writes the table. `--images` holds
train/CLASS/FILE and test/CLASS/FILE. VAE, encoder and judge are trained on all classes, so that only the diffusion model is
new to the new ones.
"""

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.files import read_json, replacing, sha256, write_json, write_text
from common.reporting import run, say
from config import RUN, MissingFile, UserError, differences, identity, parse, setting

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
ARMS = ("fine-tuned", "scratch")


@dataclass(frozen=True)
class FinetuneBenchmark:
    out: Path = setting(help="folder of runs and raw results", group="what", role=RUN)
    images: Path | None = setting(None, "train/ and test/ class folders; default: scikit-learn's digits", group="what")
    vae: str | None = setting(None, "VAE; default: the quickstart's, trained on the images", group="what")
    encoder: str | None = setting(None, "encoder, likewise", group="what")
    judge: str | None = setting(None, "timm classifier of all classes, likewise", group="what")
    new: tuple[str, ...] = setting(
        ("7", "8", "9"), "classes to fine-tune to; the base model has the others", group="what"
    )
    recipe: Path = setting(Path("recipes/digits.yaml"), "recipe of all trainings", group="what")
    resolution: int = setting(16, "pixels", group="what", at_least=1)
    per_class: int = setting(100, "training images of each new class", group="what", at_least=2)

    base_steps: int = setting(2000, "steps of the base model", group="how", at_least=1)
    steps: tuple[int, ...] = setting((50, 100, 200, 400, 800), "where to measure", group="how", at_least=1)
    seeds: tuple[int, ...] = setting((0, 1, 2), "of weights, data order and noise", group="how", at_least=0, role=RUN)
    learning_rate: float = setting(1e-3, "of fine-tuning and of training from scratch", group="how", above=0)
    samples: int = setting(300, "samples of each measurement", group="how", at_least=20)
    num_steps: int = setting(50, "SDE steps of sampling, unguided", group="how", at_least=2)
    cuda_graph: bool = setting(False, "train by a CUDA graph: the same arithmetic, faster", group="how", role=RUN)
    label: str = setting("digits", "names the result files", group="how", role=RUN)


def main(argv: Sequence[str] | None = None) -> None:
    settings = parse(FinetuneBenchmark, (__doc__ or "").splitlines()[0], argv)
    from common.lock import wait_for  # needs torch

    with closing(wait_for(settings.out, "prepare.lock")):
        folders = prepare(settings)
        before = measure(settings, folders, "base", 0, 0)  # the base model, whose rows of the new classes are fresh
    rows = [before, *(measure(settings, folders, *unit) for unit in units(settings))]
    from benchmarks.harness import environment, pick_device

    content: dict[str, Any] = {"environment": environment(pick_device("auto")), "rows": rows}
    content |= {"settings": {"seeds": settings.seeds, **_plain(settings)}, "real": real(settings, folders)}
    write_json(RESULTS / f"finetune-{settings.label}.json", content)
    table = markdown(content)
    write_text(RESULTS / f"finetune-{settings.label}.md", table)
    plot(content, RESULTS / f"finetune-{settings.label}.png")
    say(table)


def _plain(settings: FinetuneBenchmark) -> dict[str, object]:
    names = ("new", "per_class", "base_steps", "steps", "learning_rate", "samples", "num_steps", "resolution")
    return {name: getattr(settings, name) for name in names} | {"recipe": settings.recipe.name}


def units(settings: FinetuneBenchmark) -> Iterator[tuple[str, int, int]]:
    """(arm, seed, step) of each measurement of the two arms."""
    for seed in settings.seeds:
        for arm in ARMS:
            for step in settings.steps:
                yield arm, seed, step


@dataclass(frozen=True)
class Folders:
    """train: of the new classes. test: held-out images of them. vae, encoder, judge: names. base, new: packed datasets."""

    train: Path
    test: Path
    vae: str
    encoder: str
    judge: str
    base: Path
    new: Path


def prepare(settings: FinetuneBenchmark) -> Folders:
    """Images, networks, packed datasets and the base model, as far as they are not there yet."""
    out, images = settings.out, settings.images or settings.out / "images"
    if settings.images is None and not (images / "test.npz").is_file():
        _run("quickstart.digits", str(images))
    known = classes(images)
    missing = [name for name in settings.new if name not in known]
    if missing:
        raise UserError(f"--new {missing[0]}: {images / 'train'} has no such class ({', '.join(known)})")
    record(settings)
    networks = {"vae": settings.vae, "encoder": settings.encoder, "judge": settings.judge}
    for name, given in networks.items():
        if given is None:
            networks[name] = str(out / "networks" / name)
            if not (out / "networks" / name / "figures.json").is_file():
                _run("quickstart.toy_networks", name, str(images / "train"), str(networks[name]))
    vae, encoder, judge = (str(name) for name in networks.values())
    folders = Folders(out / "new-train", out / "new-test", vae, encoder, judge, out / "base", out / "new")
    for part, target, count in (("train", folders.train, settings.per_class), ("test", folders.test, None)):
        for name in settings.new:
            (target / name).mkdir(parents=True, exist_ok=True)
            for file in sorted((images / part / name).iterdir())[:count]:
                if not (target / name / file.name).exists():  # another process may be reading it
                    shutil.copy(file, target / name)
    common = ("--resolution", str(settings.resolution), "--vae", folders.vae, "--enc-type", folders.encoder)
    _pack("--source", str(folders.train), "--out", str(folders.new), *common)
    if not base_model(settings).is_dir():
        base, last = out / "base.txt", str(settings.base_steps)
        write_text(base, "".join(f"{name}\n" for name in known if name not in settings.new))
        _pack("--source", str(images / "train"), "--classes", str(base), "--out", str(folders.base), *common)
        _train(settings, folders.base, "base-model", "--max-train-steps", last, "--checkpointing-steps", last)
    return folders


def base_model(settings: FinetuneBenchmark) -> Path:
    """The finished checkpoint of the base model."""
    return settings.out / "runs" / "base-model" / "checkpoints" / f"{settings.base_steps:07d}"


def classes(images: Path) -> list[str]:
    """Names of the class folders, in the order of their numbers."""
    return sorted(path.name for path in (images / "train").iterdir() if path.is_dir())


def record(settings: FinetuneBenchmark) -> None:
    """Note in the folder what its results depend on; what is there already is never used for other settings.

    Raises:
        UserError: the folder was made with others; MissingFile where there is no recipe.
    """
    if not settings.recipe.is_file():
        raise MissingFile(f"--recipe {settings.recipe}: no such file")
    path = settings.out / "settings.json"
    now = identity(settings) | {"recipe": f"{settings.recipe.name}, SHA-256 {sha256(settings.recipe)[:16]}"}
    changes = differences(read_json(path), now) if path.is_file() else []
    if changes:
        listed = "; ".join(f"--{name.replace('_', '-')}: {was} before, {value} now" for name, was, value in changes)
        raise UserError(f"--out {settings.out} was made with other settings ({listed}): choose another --out")
    write_json(path, now)


def _run(module: str, *words: str) -> None:
    """A program in a process of its own."""
    say(f"$ python -m {module} {' '.join(words)}")
    subprocess.run([sys.executable, "-m", module, *words], check=True, cwd=ROOT)


def _pack(*words: str) -> None:
    from preprocessing import pack

    words = (*words, "--no-compile")  # takes longer than a few thousand small images
    say(f"$ python -m preprocessing.pack {' '.join(words)}")
    pack.main(words)


def _train(settings: FinetuneBenchmark, data: Path, name: str, *more: str) -> Path:
    folder = settings.out / "runs" / name
    import train

    given = ("--config", str(settings.recipe), "--data-dir", str(data), "--output-dir", str(settings.out / "runs"))
    graph = ("--cuda-graph",) if settings.cuda_graph else ()
    words = (*given, "--exp-name", name, "--sampling-steps", "0", "--keep-last", "0", "--no-compile", *graph, *more)
    say(f"$ python train.py {' '.join(words)}")
    train.main(words)
    return folder


def trained(settings: FinetuneBenchmark, folders: Folders, arm: str, seed: int, step: int) -> Path:
    """The model file after a step, trained if it is not there; fine-tuned and from scratch with the same flags."""
    if arm == "base":
        return base_model(settings)
    checkpoint = settings.out / "runs" / f"{arm}-{seed}" / "checkpoints" / f"{step:07d}"
    if not checkpoint.is_dir():
        every, warmup = math.gcd(*settings.steps), min(settings.steps)  # a checkpoint at each of the steps
        start = ("--init-from", str(base_model(settings))) if arm == "fine-tuned" else ()
        rate = ("--learning-rate", str(settings.learning_rate), "--lr-warmup-steps", str(warmup), "--ema-warmup")
        length = ("--max-train-steps", str(max(settings.steps)), "--checkpointing-steps", str(every))
        _train(settings, folders.new, f"{arm}-{seed}", "--seed", str(seed), *rate, *length, *start)
    return checkpoint


def measure(settings: FinetuneBenchmark, folders: Folders, arm: str, seed: int, step: int) -> dict[str, object]:
    """Frechet distance to the held-out images, class accuracy, and nearness to the training images, of EMA and weights."""
    file = settings.out / "results" / f"{arm}-{seed}-{step}.json"
    if file.is_file():
        return json.loads(file.read_text(encoding="utf-8"))
    import torch

    from benchmarks.harness import device_name, pick_device
    from sharing.pretrained import PretrainedSiT

    device = pick_device("auto")
    model = PretrainedSiT.from_pretrained(trained(settings, folders, arm, seed, step)).to(device)
    machine = f"{device_name(device)}, torch {torch.__version__}"
    row: dict[str, object] = {"arm": arm, "seed": seed, "step": step, "machine": machine}
    count = model.info.network.num_classes
    pixels = []
    labels = [i % count for i in range(settings.samples)]
    for start in range(0, settings.samples, 100):
        state = model.sample(labels[start : start + 100], seed=seed * 1000 + start, num_steps=settings.num_steps)
        pixels.append(model.autoencoder.decode(state.latent).cpu().numpy())
    made = np.concatenate(pixels)
    row |= judged(settings, folders, made, None if arm == "base" else np.array(labels))
    _sheet(settings, made, labels, count, f"{arm}-{seed}-{step}")
    write_json(file, row)
    return row


def judged(
    settings: FinetuneBenchmark, folders: Folders, pixels: np.ndarray, labels: np.ndarray | None
) -> dict[str, object]:
    """What the judge says of images (N, 3, H, W)."""
    import torch

    from benchmarks.harness import pick_device
    from evaluations.features import load_timm
    from evaluations.image_sets import open_images
    from evaluations.memorization import copying
    from evaluations.metrics import frechet_distance
    from evaluations.statistics import compute_moments

    judge = load_timm(folders.judge, device=pick_device("auto"), classifier=True)
    sets = {}
    for name, place in (("train", folders.train), ("test", folders.test)):
        images = open_images([place], fallback=settings.resolution)
        sets[name] = judge(torch.from_numpy(np.array(images.read(0, len(images)))).permute(0, 3, 1, 2)).pooled
    found = judge(torch.from_numpy(pixels))
    distance = frechet_distance(*(compute_moments(x).statistics() for x in (sets["test"], found.pooled)))
    near = copying(sets["train"], sets["test"], found.pooled)
    values: dict[str, object] = {"fd": distance, "nearer_to_training": near.share, "nearer_error": near.error}
    if labels is not None:
        assert found.logits is not None
        known = classes(settings.images or settings.out / "images")
        wanted = np.array([known.index(name) for name in sorted(settings.new)])[labels]
        values["accuracy"] = float((found.logits.argmax(1).cpu().numpy() == wanted).mean())
    return values


def real(settings: FinetuneBenchmark, folders: Folders) -> dict[str, object]:
    """The same of the training images themselves: what perfect copies would get."""
    from evaluations.image_sets import open_images

    images = open_images([folders.train], fallback=settings.resolution)
    return judged(settings, folders, np.array(images.read(0, len(images))).transpose(0, 3, 1, 2), images.labels)


def _sheet(settings: FinetuneBenchmark, pixels: np.ndarray, labels: list[int], count: int, name: str) -> None:
    """The first eight samples of each class."""
    from common.pictures import Cell, write_sheet

    rows = [[i for i, label in enumerate(labels) if label == k][:8] for k in range(count)]
    write_sheet(
        settings.out / "pictures" / f"{name}.png", [[Cell(pixels[i].transpose(1, 2, 0)) for i in row] for row in rows]
    )


def plot(content: dict[str, Any], path: Path) -> None:
    """Curves over the steps: mean of the seeds and their range; dashed: the base model; dotted: the training images."""
    from matplotlib.figure import Figure

    figure = Figure((10, 3), layout="constrained")
    titles = {
        "fd": "FD to held-out images",
        "accuracy": "class accuracy",
        "nearer_to_training": "nearer to training images",
    }
    before = next(row for row in content["rows"] if row["arm"] == "base")
    for axes, (key, title) in zip(figure.subplots(1, 3), titles.items()):
        for arm in ARMS:
            found: dict[int, list[float]] = {}
            for row in content["rows"]:
                if row["arm"] == arm:
                    found.setdefault(row["step"], []).append(row[key])
            steps = sorted(found)
            axes.plot(steps, [np.mean(found[step]) for step in steps], marker="o", label=arm)
            axes.fill_between(steps, *([side(found[step]) for step in steps] for side in (min, max)), alpha=0.25)
        if key in before:
            axes.axhline(before[key], color="grey", linestyle="--", label="before")
        axes.axhline(content["real"][key], color="grey", linestyle=":", label="training images")
        axes.set(title=title, xlabel="steps", xscale="log")
        axes.set(yscale="log") if key == "fd" else axes.set(ylim=(0, None))
        axes.set_xticks(content["settings"]["steps"], map(str, content["settings"]["steps"]))
        axes.minorticks_off()
    axes.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)


def markdown(content: dict[str, Any]) -> str:
    """A row for each arm and step: mean over the seeds, and their range."""
    rows, real_images = content["rows"], content["real"]
    lines = [
        "Steps | FD, fine-tuned | scratch | Accuracy, fine-tuned | scratch | Nearer to training, fine-tuned | scratch"
    ]
    lines.append("-|-|-|-|-|-|-")
    for step in sorted({row["step"] for row in rows if row["arm"] != "base"}):
        cells = [str(step)]
        for key, digits in (("fd", 2), ("accuracy", 3), ("nearer_to_training", 3)):
            for arm in ARMS:
                values = [row[key] for row in rows if row["arm"] == arm and row["step"] == step]
                text = f"{np.mean(values):.{digits}f}"
                cells.append(f"{text} ({min(values):.{digits}f} to {max(values):.{digits}f})")
        lines.append(" | ".join(cells))
    before = next(row for row in rows if row["arm"] == "base")
    lines += [
        "",
        f"Before (samples of the base model's own classes): FD {before['fd']:.2f}. The training images themselves: FD ",
    ]
    lines[-1] += (
        f"{real_images['fd']:.2f}, accuracy {real_images['accuracy']:.3f}, nearer {real_images['nearer_to_training']:.3f}."
    )
    lines += ["", f"Trained and measured on {' and '.join(sorted({row['machine'] for row in rows}))}."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run(main)

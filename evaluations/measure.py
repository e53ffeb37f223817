"""The measurement behind evaluate.py: open, collect, compute, write."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from common.reporting import say
from config import UserError
from evaluations import features as networks
from evaluations import metrics, neighbours
from evaluations.collect import Auditor, Collected, collect
from evaluations.images import ImageSet, SeveralSizes, open_images
from evaluations.reference import Reference, read_reference
from evaluations.results import Metric, Results, check_writable, sample_warnings
from evaluations.statistics import Statistics, compute_moments, jackknife_error, jackknife_groups, without
from models.acceleration import DTYPES
from models.hub import go_offline_if_unreachable

if TYPE_CHECKING:
    from evaluations.evaluate import EvaluateConfig


def measure(settings: "EvaluateConfig") -> Results | None:
    """Everything the settings ask for, written to `settings.out`; None on ranks other than 0."""
    device = start(settings.device)
    go_offline_if_unreachable()
    out = settings.out or _beside(settings.samples[0]) / "results.json"
    samples, reference = open_sets(settings)
    if rank() == 0:
        check_writable(out)
    results = Results(name=samples.name)
    auditor = Auditor()
    digests: dict[str, str] = {}
    classes = samples.labels
    for spec in settings.features:
        extractor = _in_turn(
            lambda spec=spec: networks.load(
                spec,
                device=device,
                dtype=DTYPES[settings.dtype],
                inception_weights=settings.inception_weights,
                inception_sha256=settings.inception_sha256 or networks.INCEPTION_SHA256,
            )
        )
        if extractor.space in digests:
            raise UserError(f"two --features are called {extractor.space}; rename one folder")
        digests[extractor.space] = extractor.digest
        known = None if reference is None else read_reference(reference, extractor, settings)
        found = collect(
            samples,
            extractor,
            batch_size=settings.batch_size,
            groups=max(settings.error_groups, 1),
            split=settings.split,
            auditor=auditor if len(digests) == 1 else None,
            progress=f"samples, {extractor.space}",
        )
        if rank() == 0:
            results.metrics |= space_metrics(found, known, extractor.space, settings)
            if classes is None and extractor.space == "inception":
                classes = found.predictions.numpy()
            if settings.memorization and len(digests) == 1:
                from evaluations.memorization import closest_pairs, write_pairs

                say(f"{extractor.space}: nearest reference image of each of {len(samples):,} samples")
                pairs = closest_pairs(known.pooled, found.pooled, settings.memorization)
                write_pairs(out.with_name("memorization.png"), pairs, samples, reference, known.rows)
                results.metrics["authenticity"] = Metric(
                    pairs.authenticity, None, extractor.space, len(samples), len(known.pooled)
                )
        del extractor, known, found
    audit = auditor.result() if settings.features else None
    if settings.classifier is not None:
        results.metrics |= class_accuracy(samples, settings, device, digests)
    if settings.class_tokens is not None:
        results.metrics |= token_coherence(samples, reference, settings, device)
    if rank() > 0:
        return None
    of_inception = "inception" in digests  # whose 2048 dimensions want images, and IS its order of them
    # statistics that come with a file are of a larger set than the images in it
    counted = of_inception and reference is not None and not reference.statistics
    results.warnings = sample_warnings(
        len(samples), classes if of_inception else None, audit, len(reference) if counted else None, settings.split
    )
    if digests.get("inception", networks.INCEPTION_SHA256) != networks.INCEPTION_SHA256:
        results.warnings.append(
            "the Inception weights are not the published ones: FID, sFID and IS are no such numbers"
        )
    if reference is not None and reference.shape[1:] != samples.shape[1:]:
        sizes = " and ".join(f"{s.shape[1]} x {s.shape[2]}" for s in (samples, reference))
        results.warnings.append(f"samples and reference differ in size: {sizes}")
    if samples.sidecar is None:
        results.warnings.append(f"no JSON beside {samples.name} says how the samples were made")
    say("checksums of the images, for results.json")
    results.protocol = protocol(samples, reference, settings, digests)
    results.save(out)
    return results


def open_sets(settings: "EvaluateConfig") -> tuple[ImageSet, ImageSet | None]:
    """Samples and reference. A folder of several sizes is cropped to --resolution or, without it, to the other side's size.

    Raises SeveralSizes where neither gives a size, and what open_images raises.
    """
    size = settings.resolution
    if not settings.reference:
        return open_images(settings.samples, settings.num_samples, resolution=size), None
    try:
        samples = open_images(settings.samples, settings.num_samples, resolution=size)
    except SeveralSizes:
        reference = open_images(settings.reference, resolution=size)
        samples = open_images(settings.samples, settings.num_samples, resolution=size, fallback=_side(reference))
        return samples, reference
    return samples, open_images(settings.reference, resolution=size, fallback=_side(samples))


def _side(images: ImageSet) -> int | None:
    height, width = images.shape[1:3]
    return height if height == width else None


def start(device: str) -> torch.device:
    """Join the process group when torchrun started several; choose the device; switch TF32 off."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no usable CUDA device")
    cuda = device != "cpu" and torch.cuda.is_available()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    if not cuda:
        return torch.device("cpu")
    chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(chosen)
    return chosen


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _in_turn(load):
    """Rank 0 first, so that one process fills the caches and downloads."""
    if not dist.is_initialized():
        return load()
    if rank() > 0:
        dist.barrier()
    loaded = load()
    if rank() == 0:
        dist.barrier()
    return loaded


def space_metrics(
    found: Collected, known: Reference | None, space: str, settings: "EvaluateConfig"
) -> dict[str, Metric]:
    """All metrics of one feature space, by key; Inception's have the plain names of the ADM evaluator."""
    plain = space == "inception"
    suffix = "" if plain else f"_{space}"
    n = len(found.pooled)
    values: dict[str, Metric] = {}

    def put(name: str, value: float, error: float | None = None, n_reference: int = 0) -> None:
        values[name + suffix] = Metric(value, error, space, n, n_reference)

    if plain and found.score is not None:
        put("inception_score", *found.score.estimate())
    if known is None:
        return values
    for name, kind in (("fid", "pooled"), ("sfid", "spatial")) if plain else (("fd", "pooled"),):
        if kind in known.statistics:
            dim, groups = len(known.statistics[kind].mean), settings.error_groups
            say(f"{space}: {name}, Frechet distance in {dim} dimensions; {groups} more for its standard error")
            put(name, *frechet(known.statistics[kind], found, kind, groups), known.statistics[kind].n)
    device = next(iter(found.moments.values()))[0].mean.device
    reference, samples = known.pooled.to(device), found.pooled.to(device)
    shares: dict[str, tuple[float, int]] = {}  # value, and how many images it is a share of
    pairs = f"{len(samples):,} samples and {len(reference):,} reference images"
    if settings.precision_recall:
        say(f"{space}: precision and recall of {pairs}")
        both = neighbours.precision_recall(reference, samples, rule=settings.pr_dtype)
        shares |= {"precision": (both.precision, len(samples)), "recall": (both.recall, len(reference))}
    if settings.density_coverage:
        say(f"{space}: density and coverage of {pairs}")
        density, coverage = neighbours.density_coverage(reference, samples)
        put("density", density, n_reference=len(reference))
        shares["coverage"] = coverage, len(reference)
    for name, (share, count) in shares.items():
        put(name, share, (share * (1 - share) / count) ** 0.5, len(reference))
    if settings.kernel_distance:
        say(f"{space}: kernel distance of {pairs}")
        kernel = metrics.kernel_distance(reference, samples, seed=settings.seed)
        put("kid" if plain else "kd", *kernel, len(reference))
    if space == "clip":
        say(f"{space}: CMMD of {pairs}")
        values["cmmd"] = Metric(metrics.clip_mmd(reference, samples), None, space, n, len(reference))
    return values


def frechet(reference: Statistics, found: Collected, kind: str, groups: int) -> metrics.Estimate:
    """Frechet distance, and its jackknife error over groups of samples (none for fewer than 4 samples a group)."""
    whole = found.whole(kind)
    value = metrics.frechet_distance(reference, whole.statistics())
    if groups == 0 or whole.n < 4 * groups:
        return metrics.Estimate(value, None)
    left = []
    for number in range(groups):
        if kind == "pooled":
            chosen = jackknife_groups(torch.arange(len(found.pooled)), groups) == number
            part = compute_moments(found.pooled[chosen].to(whole.mean.device))
        else:
            part = found.moments[kind][number]
        left.append(metrics.frechet_distance(reference, without(whole, part)))
    return metrics.Estimate(value, jackknife_error(left))


def class_accuracy(
    samples: ImageSet, settings: "EvaluateConfig", device: torch.device, digests: dict[str, str]
) -> dict[str, Metric]:
    """Share of the samples that an independent classifier gives their label."""
    if samples.labels is None:
        raise UserError(f"--classifier needs the labels of the samples (arr_1), which {samples.name} lacks")
    judge = _in_turn(
        lambda: networks.load_timm(settings.classifier, device=device, dtype=DTYPES[settings.dtype], classifier=True)
    )
    highest = int(samples.labels.max())
    if highest >= judge.classes:
        raise UserError(
            f"{samples.name} has label {highest}, the classifier {settings.classifier} {judge.classes} classes"
        )
    digests[f"classifier {judge.space}"] = judge.digest
    found = collect(samples, judge, batch_size=settings.batch_size, keep=0, progress="samples, classifier")
    if rank() > 0:
        return {}
    share = float((found.predictions.numpy() == samples.labels).mean())
    error = (share * (1 - share) / len(samples)) ** 0.5
    return {"class_accuracy": Metric(share, error, judge.space, len(samples))}


def token_coherence(
    samples: ImageSet, reference: ImageSet | None, settings: "EvaluateConfig", device: torch.device
) -> dict[str, Metric]:
    """Generated class tokens against the encoder's tokens of the generated images."""
    from evaluations.coherence import class_means, load_reader, load_tokens, token_metrics

    tokens = load_tokens(settings.class_tokens, len(samples))
    reader = _in_turn(lambda: load_reader(settings.encoder, settings.token_grid, device))
    found = collect(samples, reader, batch_size=settings.batch_size, progress="samples, class tokens")
    means = None
    if reference is not None:
        means = class_means(reference, settings.reference, reader, settings.batch_size, settings.pr_reference)
    return token_metrics(tokens, found.pooled, means) if rank() == 0 else {}


def protocol(
    samples: ImageSet, reference: ImageSet | None, settings: "EvaluateConfig", digests: dict[str, str]
) -> dict[str, Any]:
    """What must be equal for two results to be comparable, and what helps to repeat one."""
    return {
        "n_samples": len(samples),
        "image_size": f"{samples.shape[1]} x {samples.shape[2]}",
        "samples_cropped": samples.cropped,
        "samples_sha256": samples.digest(),
        "reference": None if reference is None else reference.name,
        "reference_cropped": None if reference is None else reference.cropped,
        "reference_sha256": None if reference is None else reference.digest(),
        "n_reference": None if reference is None else len(reference),
        "networks": digests,
        "pr_dtype": settings.pr_dtype,
        "pr_reference": settings.pr_reference,
        "split": settings.split,
        "dtype": settings.dtype,
        "sampling": samples.sidecar or {},
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("torch", "torch-fidelity", "timm", "numpy", "pillow"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _beside(path: Path) -> Path:
    return path if path.is_dir() else path.parent

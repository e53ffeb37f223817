"""The measurement behind evaluate.py: open the sets, run every network over them, compute the metrics, write the results."""

from collections.abc import Callable
from contextlib import closing
from functools import partial
from typing import Any

import numpy as np

from common.lock import claim_file
from common.processes import Processes, in_turn, on_first
from common.provenance import versions
from common.reporting import say
from config import UserError
from evaluations import features as networks
from evaluations.audit import Auditor, set_warnings
from evaluations.coherence import class_means, load_reader, load_tokens
from evaluations.collect import collect
from evaluations.image_folder import SeveralSizes
from evaluations.image_sets import ImageSet, open_images
from evaluations.memorization import Copying
from evaluations.reference import EMPTY, read_reference
from evaluations.registry import CLASSIFIER, INCEPTION, TOKENS, Inputs, compute, places, rows_wanted
from evaluations.results import Results, check_writable, markdown
from evaluations.settings import EvaluateConfig
from evaluations.sidecars import check_digest
from models.acceleration import DTYPES, allow_tf32
from models.hub import first_line, go_offline_if_unreachable


def measure(settings: EvaluateConfig) -> Results | None:
    """Measure all that the settings ask for, print it and write it to `settings.out`; None on ranks other than 0.

    Raises:
        UserError: something cannot be measured.

    Whatever ends it, also Ctrl-C, what was measured before is printed and written all the same.
    """
    run = _Measurement(settings)
    steps: list[Callable[[], None]] = [partial(run.feature_space, spec) for spec in settings.features]
    steps += [partial(run.classifier, settings.classifier)] if settings.classifier is not None else []
    steps += [run.class_tokens] if run.tokens is not None else []
    with closing(claim_file(run.out)):
        for step in steps:
            try:
                step()
            except BaseException as error:
                if run.results.metrics:
                    try:
                        run.finish(f"not everything was measured: {first_line(error)}")
                    except (UserError, OSError) as second:  # a full disk, for one: the first error is the one to report
                        say(f"warning: {second}")
                raise
        return run.finish()


class _Measurement:
    """The sets, and what has been found so far."""

    def __init__(self, settings: EvaluateConfig) -> None:
        self.settings, self.processes = settings, Processes(settings.device)
        allow_tf32(False)
        go_offline_if_unreachable()
        first = settings.samples[0]
        beside = next(place for place in (first, *first.parents) if place.is_dir())  # first may lie in an archive
        self.out = settings.out or beside / "results.json"
        self.samples, self.reference = open_sets(settings)
        self.training: ImageSet | None = None
        if settings.training_images:
            side = settings.resolution or _side(self.samples)
            self.training = open_images(settings.training_images, resolution=settings.resolution, fallback=side)
        on_first(partial(check_writable, self.out))
        self.results = Results(name=self.samples.name)
        self.auditor, self.suspicions = Auditor(), list[str]()
        self.digests: dict[str, str] = {}
        self.classes: np.ndarray | None = None  # of the samples, where Inception is among the feature spaces
        self.labels = np.zeros(0) if self.samples.labels is None else self.samples.labels
        if settings.classifier is not None and not len(self.labels):
            raise UserError(f"--classifier needs the labels of the samples (arr_1), which {self.samples.name} lacks")
        tokens = settings.class_tokens
        self.tokens = None if tokens is None else load_tokens(tokens, len(self.samples))

    def feature_space(self, spec: str) -> None:
        """All metrics of one feature space. `spec`: as for `features.load`."""
        settings = self.settings
        sha256 = settings.inception_sha256 or networks.INCEPTION_SHA256
        weights = {"inception_weights": settings.inception_weights, "inception_sha256": sha256}
        extractor = self._load(networks.load, spec, **weights)
        first, space = not self.digests, extractor.space
        if space in self.digests:
            raise UserError(f"two --features are called {space}; rename one folder")
        self.digests[space] = extractor.digest
        here = places(space, first=first)
        known = read_reference(self.reference, extractor, settings, rows=rows_wanted(settings, here))
        found = collect(
            self.samples,
            extractor,
            batch_size=settings.batch_size,
            groups=max(settings.error_groups, 1),
            split=settings.split,
            auditor=self.auditor if first else None,
            progress=f"samples, {space}",
        )
        if first:
            self.suspicions = self.auditor.warnings()
        if space == INCEPTION and found.predictions is not None:
            self.classes = found.predictions.numpy() if self.samples.labels is None else self.samples.labels
        training = None
        if first and self.training is not None:
            training = collect(
                self.training, extractor, batch_size=settings.batch_size, progress=f"training images, {space}"
            ).pooled
        self._compute(here, space, known, found, None, None, training)

    def classifier(self, name: str) -> None:
        """Share of the samples that an independent classifier gives their label. `name`: a timm network or folder."""
        judge = self._load(networks.load_timm, name, classifier=True)
        highest = int(self.labels.max())
        if highest >= judge.classes:
            raise UserError(
                f"{self.samples.name} has label {highest}, the classifier {name} has {judge.classes} classes"
            )
        self.digests[f"classifier {judge.space}"] = judge.digest
        found = collect(
            self.samples, judge, batch_size=self.settings.batch_size, keep=0, progress="samples, classifier"
        )
        self._compute({CLASSIFIER}, judge.space, EMPTY, found)

    def class_tokens(self) -> None:
        """Generated class tokens against the encoder's tokens of the generated images."""
        settings = self.settings
        reader = in_turn(partial(load_reader, settings.encoder, settings.token_grid, self.processes.device))
        found = collect(self.samples, reader, batch_size=settings.batch_size, progress="samples, class tokens")
        means = None
        if self.reference is not None:
            means = class_means(self.reference, settings.reference, reader, settings.batch_size, settings.pr_reference)
        self._compute({TOKENS}, "class token", EMPTY, found, self.tokens, means)

    def _load(self, load: Callable[..., networks.Extractor], name: str, **options: Any) -> networks.Extractor:
        dtype = DTYPES[self.settings.dtype]
        return in_turn(partial(load, name, device=self.processes.device, dtype=dtype, **options))

    def _compute(self, here: set[str], space: str, *found: Any) -> None:
        if self.processes.first:
            inputs = Inputs(here, space, self.settings, self.out, self.samples, self.reference, *found)
            self.results.metrics |= compute(inputs)

    def finish(self, *warnings: str) -> Results | None:
        """Write and print the results on rank 0; they are printed also if they cannot be written."""
        if not self.processes.first:
            return None
        results, samples, reference = self.results, self.samples, self.reference
        results.warnings = set_warnings(samples, reference, self.classes, self.settings.split) + self.suspicions
        if self.digests.get(INCEPTION, networks.INCEPTION_SHA256) != networks.INCEPTION_SHA256:
            results.warnings.append(
                "the Inception weights are not the published ones: FID, sFID and IS cannot be compared with papers"
            )
        nearness = results.metrics.get("nearer_to_training")
        if nearness is not None and (said := Copying(nearness.value, nearness.error or 0.0).warning()):
            results.warnings.append(said)
        results.warnings += warnings
        results.protocol = self._protocol()
        try:
            say("checksums of the images, for results.json")
            results.protocol["samples_sha256"] = samples.digest()
            results.warnings += check_digest(samples.sidecar, samples.name, samples.digest())
            results.protocol["reference_sha256"] = None if reference is None else reference.digest()
            results.save(self.out)
        finally:
            for warning in results.warnings:
                say(f"warning: {warning}")
            say(markdown([results]).rstrip())
        return results

    def _protocol(self) -> dict[str, Any]:
        """What must be equal for two results to be comparable, and what helps to repeat one; but for the checksums."""
        samples, reference, settings = self.samples, self.reference, self.settings
        return {
            "n_samples": len(samples),
            "image_size": f"{samples.shape[1]} x {samples.shape[2]}",
            "samples_cropped": samples.cropped,
            "samples_sha256": None,
            "reference": None if reference is None else reference.name,
            "reference_cropped": None if reference is None else reference.cropped,
            "reference_sha256": None,
            "n_reference": None if reference is None else len(reference),
            **({"training_images": self.training.name, "n_training": len(self.training)} if self.training else {}),
            "networks": self.digests,
            "pr_dtype": settings.pr_dtype,
            "pr_reference": settings.pr_reference,
            "split": settings.split,
            "dtype": settings.dtype,
            "sampling": samples.sidecar or {},
            "versions": versions(("torch", "torch-fidelity", "timm", "numpy", "pillow")),
        }


def open_sets(settings: EvaluateConfig) -> tuple[ImageSet, ImageSet | None]:
    """Samples and reference. A folder of several sizes is cropped to --resolution or, without it, to the other side's size.

    Raises:
        SeveralSizes: neither gives a size. Also what open_images raises.
    """
    size, limit = settings.resolution, settings.num_samples
    if not settings.reference:
        return open_images(settings.samples, limit, resolution=size), None
    try:
        samples = open_images(settings.samples, limit, resolution=size)
    except SeveralSizes:
        reference = open_images(settings.reference, resolution=size, statistics=True)
        return open_images(settings.samples, limit, resolution=size, fallback=_side(reference)), reference
    return samples, open_images(settings.reference, resolution=size, fallback=_side(samples), statistics=True)


def _side(images: ImageSet) -> int | None:
    height, width = images.shape[1:3]
    return height if height == width and height else None

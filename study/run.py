"""Train the runs of a level and judge each at its checkpoints; what the raw results hold is not done again."""

import dataclasses
import shutil
import time
from collections.abc import Callable
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any

import torch

from common.files import fingerprint
from common.lock import claim_if_free, wait_for
from common.pictures import write_png
from common.processes import Processes, from_first, in_turn, on_first, share
from common.provenance import processor, versions
from common.reporting import say
from config import RESULT, UserError, as_dict, parse
from evaluations.image_sets import open_images
from models.acceleration import allow_tf32
from models.autoencoder import Autoencoder, load_autoencoder
from models.cost import cost
from models.guidance import Guidance
from models.sit import SiT
from packed.format import read_manifest
from quickstart.stages import Runner
from study.judge import Judge, Samples, Teacher, draw, floors, oracle
from study.ledger import Ledger
from study.levels import Level
from study.plan import EMA, NO_TEACHER, RAW, Spec, judgements, runs
from study.settings import StudyConfig, recipe
from training import checkpoints
from training.run import Run
from training.settings import TrainConfig
from training.setup import prepare

PICTURES = 20  # samples of seed 0 that are kept as a picture, ten in a row


class Study:
    """A level's networks, judges and raw results, each loaded when it is first needed.

    Ranks train and sample together; rank 0 alone prepares, judges and writes.
    """

    def __init__(self, settings: StudyConfig, device: torch.device | str = "cpu") -> None:
        allow_tf32(False)  # in whatever is judged: a GPU's rows differ from a CPU's by rounding alone
        self.settings = settings
        self.out = settings.out / settings.level
        self.level = Level(self.out, settings)
        self.ledger = Ledger(settings.results / f"{settings.level}.jsonl")
        environment = {"OMP_WAIT_POLICY": "PASSIVE", "WANDB_MODE": "offline", "WORLD_SIZE": "1"}
        self.device = torch.device(device)
        self.runner = Runner(self.out, environment)
        self.train_settings = cache(self._train_settings)
        self.judge = cache(self._judge)
        self.teacher = cache(self._teacher)
        self.autoencoder = cache(self._autoencoder)
        self.changed = cache(self._changed)

    def _judge(self) -> Judge:
        return Judge(self.level.train_images, self.level.spaces, self.device, 100, self.out / "features")

    def _teacher(self, dataset: Path) -> Teacher:
        return Teacher(dataset, self.device, 100)

    def _autoencoder(self, name: str) -> Autoencoder:
        return in_turn(lambda: load_autoencoder(name)).to(self.device)

    def _changed(self) -> dict[str, Any]:
        """Images, networks and spaces that are not those of the level's recipe; files by what they hold."""
        settings, own = self.settings, recipe(self.settings.level)
        names = [
            f.name for f in dataclasses.fields(own) if (f.metadata["group"], f.metadata["role"]) == ("images", RESULT)
        ]
        changed = {name: getattr(settings, name) for name in names if getattr(settings, name) != getattr(own, name)}
        if "packed" in changed:
            changed["packed"] = fingerprint(read_manifest(changed["packed"]).shards)
        for name in {"train_images", "held_out"} & changed.keys():
            changed[name] = open_images([changed[name]]).digest()
        if "spaces" in changed:
            changed["spaces"] = [Path(space).name for space in changed["spaces"]]
        return changed

    def _train_settings(self, spec: Spec) -> TrainConfig:
        """The settings of train.py for one run."""
        settings = self.settings
        flags = {
            "--config": settings.train,
            "--data-dir": self.level.dataset(spec),
            "--output-dir": self.out / "runs",
            "--exp-name": spec.name,
            "--max-train-steps": settings.steps[-1],
            "--ema-decay": settings.ema_decay,
            "--sampling-steps": 0,
            "--checkpointing-steps": settings.steps[-1],
            "--keep-last": 1,
        }
        words = [str(word) for pair in flags.items() for word in pair]
        words += ["--compile" if settings.compile else "--no-compile", "--no-allow-tf32"]
        words += ["--cuda-graph"] * settings.cuda_graph
        return parse(TrainConfig, "a run of the study", [*words, *spec.flags])

    def prepare(self, spec: Spec) -> None:
        """Images, networks and dataset of a run; of several programs one makes them and the others wait."""
        with closing(wait_for(self.out / "locks", "level.lock")):
            self.level.prepare(spec, self.runner)

    def key(self, spec: Spec, step: int, weights: str = EMA) -> str:
        """Digest of all that a judgement depends on; settings at their defaults, and images as in the level's recipe, are
        left out, so that new ones do not change it, and paths, so that the study may be moved."""
        train = self.train_settings(spec)
        changed = {
            field.name: value
            for field in dataclasses.fields(train)
            if field.metadata["role"] == RESULT and (value := as_dict(train)[field.name]) != field.default
        }
        run = {"data": spec.data, "teacher": spec.teacher, "train": changed, "step": step, "weights": weights}
        judged = {"level": self.settings.level, "samples": self.settings.samples, "solver": self.settings.solver_steps}
        images = {name: value for name, value in self.changed().items() if name != "held_out"}  # that is the floors'
        return fingerprint([run, judged, *([images] if images else [])])[:16]

    def wanted(self, spec: Spec) -> dict[tuple[int, str], str]:
        """(step, weights) of the judgements that a run is to give, with their keys."""
        return {one: self.key(spec, *one) for one in judgements(spec, self.settings)}

    def run(self, spec: Spec) -> None:
        """Train one run from its newest checkpoint on, and judge it wherever the raw results lack it, unless another program
        does."""
        on_first(lambda: self.prepare(spec))
        folder = self.out / "runs" / spec.name
        lock = claim_if_free(self.out / "locks", f"{spec.name}.lock", f"{spec.name} is left out here")
        if lock is None:
            return
        with closing(lock):
            wanted, done = self.wanted(spec), from_first(self.ledger.keys)
            missing = [step for (step, _), key in wanted.items() if key not in done]
            if not missing:  # another program has finished it in the meantime
                return

            def clear() -> None:
                newest = checkpoints.newest(folder / "checkpoints", say)
                if newest is not None and int(newest.name) > min(missing):
                    shutil.rmtree(folder)  # trained before, judged otherwise: start again

            on_first(clear)
            with prepare(self.train_settings(spec)) as run:
                trained, resumed = 0.0, run.step  # processor seconds; a resumed run's are those of its later steps
                for step in self.settings.steps:
                    if run.step > step:
                        continue
                    started = time.process_time()
                    reason = advance(run, step)
                    run.save()
                    if reason:
                        raise SystemExit(run.conclude(reason))
                    trained += time.process_time() - started
                    for (at, weights), key in wanted.items():
                        if at == step and key not in done:
                            parts = run.train_step
                            network = parts.network if weights == RAW else parts.ema.average
                            taken = run.step - resumed  # without any of its steps their cost is not known
                            seconds = trained * run.step / taken if taken else None
                            self.judged(spec, run, network.eval(), weights, key, seconds)
                    run.train_step.network.train()

    @torch.no_grad()
    def judged(self, spec: Spec, run: Run, network: SiT, weights: str, key: str, trained: float | None) -> None:
        """Sample a network, judge the samples and append the line."""
        started, info = time.process_time(), run.plan.model_info(run.step, spec.seed)
        judge, autoencoder = self.judge(), self.autoencoder(run.plan.vae)
        count, batch, steps = self.settings.samples, self.settings.batch_size, self.settings.solver_steps
        guidance = guidance_of(weights)
        samples = draw(network, autoencoder, count, path=info.path, steps=steps, batch=batch, guidance=guidance)

        def append() -> None:
            label = samples.label if spec.labelled else None
            metrics = judge.images(samples.pixels, label)
            teacher = self.teacher(self.level.dataset(spec))
            metrics |= teacher.tokens_of(samples) | teacher.layers(network, info)
            line = {
                **dataclasses.asdict(spec),
                **{"key": key, "step": run.step, "weights": weights, "images": run.step * run.settings.batch_size},
                **{"samples": count, "metrics": metrics, "train_flops_per_image": cost(network.config).train_flops},
                **{"cpu_seconds": {"training": trained, "judging": time.process_time() - started}},
                "networks": self.digests(spec),
                "machine": machine()
                | {name: True for name in ("compile", "cuda_graph") if getattr(self.settings, name)},
            }
            self.ledger.append(line)
            say(f"{spec.name}, step {run.step}, {weights}: {shown(metrics)}")
            if spec.seed == 0 and weights == EMA and ":" not in spec.data and "+" not in spec.row:
                self.picture(f"{spec.data}-{spec.teacher}-{spec.row}-{run.step}", samples)

        on_first(append)

    def picture(self, name: str, samples: Samples) -> None:
        """Keep the first samples."""
        n, c, h, w = samples.pixels[:PICTURES].shape
        rows = samples.pixels[:PICTURES].view(n // 10, 10, c, h, w).permute(0, 3, 1, 4, 2).reshape(-1, 10 * w, c)
        write_png(self.settings.results / "pictures" / self.settings.level / f"{name}.png", rows.numpy())

    def digests(self, spec: Spec) -> dict[str, str]:
        """Weights of the networks that a line depends on."""
        manifest = self.teacher(self.level.dataset(spec)).data.manifest
        teacher = {} if spec.teacher == NO_TEACHER else {spec.teacher: manifest.encoders[0].weights[:16]}
        return {**self.judge().digests, "vae": manifest.vae.get("weights", "")[:16], **teacher}

    def floors(self, spec: Spec) -> None:
        """What real images reach in the judges' spaces, and the teacher's own tokens of them: lines of their own."""
        on_first(lambda: self.prepare(spec))
        judge, autoencoder = self.judge(), self.autoencoder(read_manifest(self.level.dataset(spec)).vae["name"])
        on_first(lambda: self._floors(spec, judge, autoencoder))

    def _floors(self, spec: Spec, judge: Judge, autoencoder: Autoencoder) -> None:
        held_out, dataset = self.level.held_out, self.level.dataset(spec)
        head = {"level": self.settings.level, "teacher": spec.teacher, "data": spec.data}

        def append(row: str, measured: Callable[[], dict[str, float]], **names: str) -> None:
            key = fingerprint([head["level"], row, names, *([self.changed()] if self.changed() else [])])[:16]
            done = self.ledger.keys()
            if key not in done:
                line = {"key": key, "row": row, **names, "metrics": measured(), "machine": machine()}
                self.ledger.append({**line, "networks": self.digests(spec)})

        real = cache(lambda: floors(judge, autoencoder, held_out))
        with closing(wait_for(self.out / "locks", "floors.lock")):
            for row in ("held-out", "reconstructions"):
                append(row, lambda row=row: real()[row])  # type: ignore[misc]
            if spec.teacher != NO_TEACHER:
                names = {"teacher": spec.teacher, "data": spec.data}
                append("oracle token", lambda: oracle(self.teacher(dataset), held_out), **names)
                if not self.settings.packed:
                    append("teacher", lambda: self.level.accuracy(spec.teacher), teacher=spec.teacher)


def guidance_of(weights: str) -> Guidance:
    """Of the words of what is judged, `ema guided SCALE TOKEN_SCALE HIGH`; none without them.

    Raises:
        UserError: the words cannot be read.
    """
    _, _, words = weights.partition(" guided ")
    if not words:
        return Guidance()
    try:
        scale, token, high = map(float, words.split())
    except ValueError as error:
        raise UserError(f"guidance: {words!r} must be three numbers, 'SCALE TOKEN_SCALE HIGH'") from error
    return Guidance(scale, token, high=high)


def advance(run: Run, step: int) -> str | None:
    """Train up to a step; returns what asked to stop before it."""
    reason = None
    while run.step < step and reason is None:
        run.advance()
        reason = run.interrupt.requested()
        if run.due(run.settings.log_every):
            run.log()
    return reason


def machine() -> dict[str, Any]:
    """GPU if there is one, processor, threads and packages."""
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {**gpu, "processor": processor(), "threads": torch.get_num_threads(), **versions(("torch", "timm", "numpy"))}


def shown(metrics: dict[str, float]) -> str:
    """The metrics in one line, without their errors."""
    return ", ".join(f"{name} {value:.3f}" for name, value in metrics.items() if not name.endswith("_error"))


def selected(settings: StudyConfig) -> list[Spec]:
    """The runs that have all words of --only."""
    named = [({spec.data, spec.teacher, spec.row, f"seed{spec.seed}", spec.name}, spec) for spec in runs(settings)]
    return [spec for words, spec in named if words.issuperset(settings.only)]


def study(settings: StudyConfig) -> None:
    """All runs of a level that the raw results lack, in their order."""
    work = Study(settings, Processes().device)
    started, specs = time.monotonic(), selected(settings)
    done = from_first(work.ledger.keys)
    missing = {spec: sum(key not in done for key in work.wanted(spec).values()) for spec in specs}
    say(f"{len(specs)} runs, {sum(not count for count in missing.values())} of them finished; {work.ledger.path}")
    for spec in specs:
        if settings.dry_run:
            say(f"{spec.name}{' guided' * spec.guided}: {missing[spec]} of {len(work.wanted(spec))} judgements missing")
            continue
        if settings.max_hours and share(time.monotonic() - started > 3600 * settings.max_hours):
            say(f"stopped after {settings.max_hours:g} hours; the same command goes on")
            return
        if not from_first(work.ledger.keys).issuperset(work.wanted(spec).values()):
            work.floors(spec)
            work.run(spec)

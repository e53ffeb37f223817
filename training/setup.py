"""Build a training run: settings against dataset, lock and record of the folder, then weights, resume and tracker."""

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from common.files import fingerprint
from common.lock import claim
from common.processes import broadcast, from_first, in_turn, on_first, share
from common.reporting import progress, say
from dataset import PackedDataset, StepSampler, read_ahead
from models.acceleration import allow_tf32, check_norm_kernel, compile_encoder, compile_network, decide_compile
from models.autoencoder import Autoencoder, load_autoencoder
from models.ema import EMA
from models.encoder import load_encoder
from models.model_file import blank_network
from models.sit import SiT
from packed.format import read_manifest
from training import checkpoints, graph, trackers
from training.dry_run import check_shares, start_text, with_micro_batches
from training.folder import record_settings
from training.initial import Source, open_source, take_weights
from training.interrupt import Interrupt
from training.launch import Processes, check_launcher, gpu_memory
from training.plan import Plan, make_plan
from training.probe import FrechetProbe
from training.run import Run
from training.schedule import learning_rate
from training.settings import TrainConfig
from training.step import TrainStep
from training.tracking import Tracker, Window, merge_windows


@contextmanager
def prepare(settings: TrainConfig) -> Iterator[Run]:
    """Start or resume the run that the settings describe; at the end close its lock, tracker and reading threads.

    What costs little comes first: settings, dataset, lock and record of the folder are checked before any weights are
    loaded or images are measured.

    Raises:
        UserError: settings, launcher, dataset, folder, weights or tracker are not as they must be.
    """
    check_launcher(settings.gradient_accumulation_steps)
    processes = Processes(settings.mixed_precision)
    if settings.cuda_graph:
        graph.check(processes.precision, processes.world, processes.device)
    settings = replace(settings, compile=decide_compile(settings.compile, processes.device))
    data_dir, name = settings.data_dir, settings.exp_name
    assert data_dir is not None and name is not None
    on_first(lambda: trackers.check(settings.report_to))
    plan = make_plan(settings, read_manifest(data_dir))
    check_shares(settings, processes.world)
    if settings.norm_kernel:
        check_norm_kernel(plan.network.hidden_size, processes.precision, processes.device, settings.compile)
    settings = with_micro_batches(settings, plan, processes.world, processes.precision, gpu_memory(processes.device))
    dataset = PackedDataset(data_dir, plan.fields)
    micro_batches = settings.gradient_accumulation_steps
    sampler = StepSampler(
        len(dataset),
        settings.batch_size,
        seed=settings.seed,
        rank=processes.rank,
        world=processes.world,
        micro=micro_batches,
    )
    class_means = plan.class_means(data_dir)
    folder = settings.output_dir / name
    source = from_first(lambda: open_source(settings, plan))
    with ExitStack() as stack:
        lock = claim(folder, "run.lock", "wait for it, or choose another --exp-name")
        stack.enter_context(closing(lock))
        plan = replace(plan, notes=on_first(lambda: _record(folder, settings, plan, source)) or {})
        if processes.first:
            say(start_text(settings, plan, processes, folder))
        autoencoder, probe = _load_viewers(settings, plan, processes)
        train_step, window, step = _build(settings, plan, source, processes, folder / "checkpoints")
        sampler.start_step = step
        reader = read_ahead(dataset, sampler, threads=settings.num_workers, device=processes.device)
        bar = progress(
            settings.max_train_steps, unit="step", description="training", initial=step, shown=processes.first
        )
        yield Run(
            settings=settings,
            folder=folder,
            processes=processes,
            plan=plan,
            dataset=dataset,
            train_step=train_step,
            window=window,
            batches=stack.enter_context(closing(reader)),
            positions=[torch.from_numpy(sampler.positions(m)).to(processes.device) for m in range(micro_batches)],
            step=step,
            saved_step=step,
            tracker=on_first(lambda: stack.enter_context(closing(Tracker(folder, settings, step)))),
            bar=stack.enter_context(bar),
            interrupt=stack.enter_context(Interrupt(processes.world, settings.max_hours)),
            autoencoder=autoencoder,
            probe=probe,
            class_means=class_means,
        )


def _record(folder: Path, settings: TrainConfig, plan: Plan, source: Source | None) -> dict[str, Any]:
    """Compare the settings with those the folder was started with, and write them down; returns notes for model files."""
    manifest = plan.manifest
    facts = {
        "network": asdict(plan.network),
        "encoders": plan.encoders,
        "images": manifest.count,
        "classes": manifest.classes,
        "packed_vae": manifest.vae["name"],
        "data": fingerprint(manifest.shards)[:16],
    }
    if settings.lr_schedule != "constant":
        facts["last step of the learning rate"] = settings.max_train_steps
    if source is not None:
        facts["initialised_from"] = source.sha256
    changes, kept = record_settings(folder, settings, facts)
    for change in changes:
        say(f"continuing with another setting: {change}")
    return {"initialised_from": kept["initialised_from"]} if "initialised_from" in kept else {}


def _load_viewers(
    settings: TrainConfig, plan: Plan, processes: Processes
) -> tuple[Autoencoder | None, FrechetProbe | None]:
    """The VAE of the previews and the Frechet probe with its reference, where the settings ask for them."""
    load = lambda: load_autoencoder(plan.vae).to(processes.device)  # noqa: E731
    if not settings.eval_every:
        return (on_first(load) if settings.sampling_steps else None), None
    assert settings.eval_reference is not None
    autoencoder = in_turn(load)
    probe = FrechetProbe(
        autoencoder,
        processes.device,
        reference=settings.eval_reference,
        training=settings.eval_training,
        space=settings.eval_features,
        count=settings.eval_samples,
        resolution=plan.manifest.resolution,
    )
    return autoencoder, probe


def _build(
    settings: TrainConfig, plan: Plan, source: Source | None, processes: Processes, folder: Path
) -> tuple[TrainStep, Window, int]:
    """Step, log window and number of steps taken, as in the newest intact checkpoint if there is one."""
    allow_tf32(settings.allow_tf32)
    encoders = [
        in_turn(partial(load_encoder, e.name, e.grid, class_token=e.has_class_token)).to(processes.device)
        for e in plan.online
    ]
    found = share(on_first(lambda: checkpoints.newest(folder, say)))
    # On GPUs each rank maps the files: those of a node share their pages, and no rank has a copy of its own in host memory.
    # On a CPU the moments would stay pages of a file that is rotated away.
    loaded = None if found is None else checkpoints.load(found, mapped=processes.device.type != "cpu")
    network, ema = _networks(settings, plan, source, processes, loaded)
    adam: dict[str, Any] = {
        "lr": settings.learning_rate,
        "betas": (settings.adam_beta1, settings.adam_beta2),
        "weight_decay": settings.adam_weight_decay,
        "eps": settings.adam_epsilon,
    }
    optimizer = torch.optim.AdamW(network.parameters(), **adam, fused=True)
    scaler = torch.amp.GradScaler(processes.device.type) if processes.precision == "fp16" else None
    window = Window(processes.device)
    if loaded is not None:
        optimizer.load_state_dict(loaded.optimizer)
        for group in optimizer.param_groups:
            group.update(adam)  # changed ones count from here on (--accept-changes)
        if scaler is not None and loaded.scaler:
            scaler.load_state_dict(loaded.scaler)
        if len(loaded.window) == processes.world:
            window.values.copy_(loaded.window[processes.rank])
        elif processes.first:  # another number of processes: the first one carries on all their sums
            window.values.copy_(merge_windows(loaded.window))
        say(f"resuming from {found} at step {loaded.step} of {settings.max_train_steps}")
    if settings.compile:
        compile_network(network, norm_kernel=settings.norm_kernel)
        compile_network(ema.average)  # samples previews; what is not called is not compiled
        for encoder in encoders:
            compile_encoder(encoder)
    make = graph.GraphedStep if settings.cuda_graph else TrainStep
    train_step = make(
        network,
        plan.objective,
        optimizer,
        ema,
        plan.normalization,
        seed=settings.seed,
        wrapped=processes.wrap(network),
        no_sync=processes.no_sync,
        encoders=encoders,
        precision=processes.precision,
        scaler=scaler,
        max_grad_norm=settings.max_grad_norm,
        learning_rate=partial(learning_rate, settings),
        compiled=bool(settings.compile),
    )
    return train_step, window, loaded.step if loaded else 0


def _networks(
    settings: TrainConfig,
    plan: Plan,
    source: Source | None,
    processes: Processes,
    loaded: checkpoints.TrainingState | None,
) -> tuple[SiT, EMA]:
    """The network and its EMA on the device: of the checkpoint, or made by rank 0 and handed to the others.

    Only rank 0's fresh weights are ever initialised; all else begins on the device, uninitialised.
    """

    def fresh() -> SiT:
        torch.manual_seed(settings.seed)
        network = SiT(plan.network)
        if source is not None:
            say(take_weights(network, source, plan))
        return network.to(processes.device)

    made = on_first(fresh) if loaded is None else None
    network = blank_network(plan.network, processes.device) if made is None else made
    network.gradient_checkpointing = settings.gradient_checkpointing
    if loaded is None:
        broadcast(network.state_dict().values())
    else:
        network.load_state_dict(loaded.model)
    average = blank_network(plan.network, processes.device)
    ema = EMA(network, average, settings.ema_decay, warmup=settings.ema_warmup)
    if loaded is not None:
        average.load_state_dict(loaded.ema)
    return network, ema

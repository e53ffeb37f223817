"""The work of packing: each rank reads, encodes and writes whole shards: records do not depend on the number of ranks."""

import os
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from common.files import check_space, existing, free_space
from common.lock import FolderLock, claim
from common.processes import Processes, from_first, gather, on_first
from common.reporting import progress, say
from config import UserError
from packed.format import write_manifest
from preprocessing import messages
from preprocessing.encode import Encoded, Networks, Pending
from preprocessing.extend import joined
from preprocessing.index import Index
from preprocessing.manifest import build_manifest, write_class_means
from preprocessing.messages import Totals
from preprocessing.plan import Plan, check_settings, check_source, index_source, is_complete, make_plan, read_parts
from preprocessing.read import CropDataset, Crops, Reader, Request, as_is
from preprocessing.settings import PackConfig
from preprocessing.verify import repair
from preprocessing.writer import BackgroundWriter

LOCK = ".packing.lock"
SHARED_MEMORY = Path("/dev/shm")
_PATIENCE = 1800  # seconds for a batch to be read, after which it counts as lost


def requests(index: Index, plan: Plan, shards: list[int]) -> Iterator[Request]:
    """Batches of the shards, one shard after another."""
    size = plan.settings["batch_size"]
    for shard in shards:
        start, stop = plan.range(shard)
        for first in range(start, stop, size):
            last = min(first + size, stop)
            yield Request(shard, index.items(first, last), last == stop)


def pack(settings: PackConfig) -> None:
    """Pack, finish packing, repair, or extend. Raises UserError for what the user can correct."""
    processes = Processes()
    if settings.repair and processes.world > 1:
        raise UserError("--repair: runs as one process; finish with the same command under torchrun without --repair")
    if not settings.repair and from_first(lambda: _is_packed(settings, check_settings(settings))):
        return
    with closing(_claim(settings.out)):
        if settings.repair:
            repair(settings.out)
        _pack(settings, processes)


def _is_packed(settings: PackConfig, begun: Plan | None) -> bool:
    """Whether there is nothing to do, which is then said. Raises UserError where there is nothing to extend yet."""
    out = settings.out
    complete = begun is not None and is_complete(out, begun)
    if settings.extend and not complete and not (begun and begun.extends):
        raise UserError(
            f"--extend: {out} holds no finished dataset to add images to; give the same command without --extend first"
        )
    if begun is None or not complete or settings.extend:
        return False
    check_source(settings, begun)
    say(
        f"{out} is packed already: {begun.count} images (--verify re-reads it; --extend adds images that were added to "
        f"{settings.source})"
    )
    return True


def _claim(out: Path) -> FolderLock:
    """Lock the folder for all ranks. Raises UserError if nothing can be written there, or another program writes."""
    on_first(lambda: _check_writable(out))
    return claim(out, LOCK, "wait until it has ended, or give another --out")


def _check_writable(out: Path) -> None:
    there = existing(out)  # nothing is made yet: a refused start leaves no folder
    if not there.is_dir():
        raise UserError(f"--out {out}: the folder cannot be made ({there} is a file)")
    if not os.access(there, os.W_OK):
        raise UserError(f"--out {out}: the folder is read-only; give another --out")


def _pack(settings: PackConfig, processes: Processes) -> None:
    out = settings.out
    begun = from_first(lambda: check_settings(settings))
    parts = on_first(lambda: _list_images(settings, begun)) or []
    kind = from_first(lambda: parts[-1].kind if parts else None)
    if kind is None:
        return
    if settings.flip and kind == "published":
        raise UserError(
            f"--flip: {settings.source} brings its latents, which cannot be mirrored; pack the images instead"
        )
    networks = Networks(settings, has_moments=kind == "published", device=processes.device)
    plan = from_first(lambda: make_plan(settings, parts, networks, begun))
    index = joined(read_parts(out, plan))
    here = from_first(lambda: _elsewhere(index, joined(parts)))
    todo = from_first(lambda: plan.unfinished(out))

    def announce() -> None:
        say(messages.needs(out, plan, index, todo, processes.device, processes.world))
        check_space("--out", out, plan.bytes(todo), "--pixels without --tokens (--no-tokens) takes less")

    on_first(announce)
    networks.compile(settings.compile, plan.count)  # of what is done, too: a restart computes as the start did
    totals = pack_shards(here or index, plan, todo[processes.rank :: processes.world], networks, settings, processes)
    everyone = gather(totals)

    def finish() -> None:
        write_class_means(out, plan, index)
        manifest = build_manifest(out, plan, index)
        write_manifest(out, manifest)
        say(messages.summary(out, manifest.source, everyone))

    on_first(finish)


def _elsewhere(listed: Index, found: Index) -> Index | None:
    """The images where they are by now; None if that is where they were listed."""
    there = (listed.kind, listed.root, listed.files) == (found.kind, found.root, found.files)
    return None if there else found


def _list_images(settings: PackConfig, begun: Plan | None) -> list[Index]:
    """The images by part; none if there is nothing to do, which is then said."""
    if _is_packed(settings, begun):
        return []
    say(f"listing the images of {settings.source}")
    known = begun if begun is not None and is_complete(settings.out, begun) else None
    parts = index_source(settings, begun, extend=known is not None)
    if known is not None and len(parts) == len(known.parts):
        say(f"{settings.out}: all images of {settings.source} are packed already ({known.count}); nothing to add")
        return []
    return parts


def pack_shards(
    index: Index, plan: Plan, shards: list[int], networks: Networks, settings: PackConfig, processes: Processes
) -> Totals:
    """Write the given shards of a plan. Raises UserError for an image that cannot be read, or a full disk."""
    reader = Reader(index.kind, index.root, index.files)
    side = plan.settings["resolution"]
    workers = _workers(settings.num_workers, plan.copies * plan.settings["batch_size"] * 3 * side * side)
    loader = DataLoader(
        CropDataset(reader, side, settings.max_pixels, flip=plan.copies > 1),
        sampler=requests(index, plan, shards),
        batch_size=None,
        collate_fn=as_is,
        num_workers=workers,
        timeout=_PATIENCE if workers else 0,
        pin_memory=networks.device.type == "cuda",
    )
    batches = iter(loader)  # worker processes start here
    count = sum(stop - start for start, stop in map(plan.range, shards))
    share = f" (1/{processes.world} of the images)" if processes.world > 1 else ""
    bar = progress(count, unit="image", description=f"packing{share}", shown=processes.first)
    waiting, start = 0.0, time.monotonic()
    done, warm = 0, (0, start)  # images, and those of the first batch, which warms the device up, with its time
    tally: dict[int, dict[str, Any]] = {}
    with BackgroundWriter(settings.out) as writer, bar:
        pending: Pending | None = None
        while True:
            clock = time.monotonic()
            crops = _next(batches)
            waiting += time.monotonic() - clock
            if crops is not None and crops.bad and settings.on_corrupt == "error":
                name, reason = crops.bad[0]
                raise UserError(
                    f"--source {settings.source}: image {name}: {reason}; --on-corrupt skip leaves such images out and "
                    "lists them"
                )
            following = networks.start(crops) if crops is not None else None
            if pending is not None:
                _write(writer, networks.finish(pending), plan, tally)
                done += len(pending.crops.request.items)
                bar.update(len(pending.crops.request.items))
                now = time.monotonic()
                if pending.crops.request.last and shards[1:] and pending.crops.request.shard == shards[0]:
                    say(messages.forecast(done - warm[0], now - warm[1], count - done, processes.world))
                elif warm == (0, start):
                    warm = done, now
            if following is None:
                break
            pending = following
    return Totals(count, time.monotonic() - start, waiting)


def _next(batches: Iterator[Crops]) -> Crops | None:
    """The next batch of the reading processes. Raises UserError where one of them has died, or a batch was lost."""
    try:
        return next(batches, None)
    except RuntimeError as error:
        text = " ".join(str(error).split())
        lack = "shared memory" in text or "Bus error" in text
        if "DataLoader" not in text or (text.startswith("Caught ") and not lack):  # an error inside a process is a bug
            raise
        cause = "shared memory is full" if lack else text[:200]
        raise UserError(
            f"the processes that read images have failed ({cause}); the same command goes on from here, with "
            "--num-workers 0 without such processes"
        ) from error


def _write(writer: BackgroundWriter, encoded: Encoded, plan: Plan, tally: dict[int, dict[str, Any]]) -> None:
    """Hand a batch to the writer; the last of a shard goes with the shard's notes."""
    crops = encoded.crops
    shard = crops.request.shard
    notes = tally.setdefault(shard, {"plan": plan.part(shard).id, "skipped": [], "enlarged": 0, "error": {}})
    notes["skipped"] += [list(bad) for bad in crops.bad]
    notes["enlarged"] += crops.enlarged
    for name, value in encoded.errors.items():
        notes["error"][name] = max(value, notes["error"].get(name, 0.0))
    writer.put(shard, encoded.arrays, tally.pop(shard) if crops.request.last else None)


def _workers(wanted: int | None, batch_bytes: int) -> int:
    """Reading processes of one rank: by default the cores of this machine, shared among its ranks, but for one.

    Args:
        wanted: --num-workers.
        batch_bytes: of the crops of a batch. Each process keeps two batches ready, in shared memory.

    Raises:
        UserError: the wanted number of processes does not fit into the free shared memory; by default fewer are started.
    """
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    workers = max(len(os.sched_getaffinity(0)) // local - 1, 0) if wanted is None else wanted
    if workers == 0 or not SHARED_MEMORY.is_dir():
        return workers
    free, each = free_space(SHARED_MEMORY), 2 * batch_bytes * local
    if workers * each <= free:
        return workers
    text = (
        f"{workers} reading processes take {workers * each / 1e6:,.1f} MB in {SHARED_MEMORY}, where {free / 1e6:,.1f} MB "
        "are free (docker run --shm-size 8g gives a container more)"
    )
    if wanted is None:
        say(f"{text}: {free // each} are started")
        return free // each
    raise UserError(
        f"--num-workers {wanted}: {text}; give at most --num-workers {free // each}, or a smaller --batch-size"
    )

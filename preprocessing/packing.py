"""The work of packing: each process reads, encodes and writes whole shards, so that records do not depend on how many there
are."""

import datetime
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from common.reporting import progress, say
from config import UserError
from packed.format import write_manifest
from preprocessing import messages
from preprocessing.extend import joined
from preprocessing.finish import describe, write_class_means
from preprocessing.index import Index
from preprocessing.messages import Totals
from preprocessing.networks import Encoded, Networks, Pending
from preprocessing.plan import Plan, check_room, check_settings, index_source, is_complete, make_plan, read_parts
from preprocessing.read import CropDataset, Crops, Reader, Request, as_is
from preprocessing.writer import BackgroundWriter

_PATIENCE = datetime.timedelta(days=7)  # processes wait for each other only at the two ends


class Ranks:
    """The processes of torchrun; one alone needs no group. They exchange a few words, no tensors: gloo does."""

    def __init__(self) -> None:
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        if self.world > 1 and not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo", timeout=_PATIENCE)

    def share(self, value: Any) -> Any:
        """The first process's value, in every process."""
        if self.world == 1:
            return value
        content = [value]
        torch.distributed.broadcast_object_list(content, src=0)
        return content[0]

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, in every process; waits for the slowest."""
        if self.world == 1:
            return [value]
        content = [None] * self.world
        torch.distributed.all_gather_object(content, value)
        return content


class Requests(Sampler):
    """Batches of the shards, one shard after another."""

    def __init__(self, index: Index, plan: Plan, shards: list[int]) -> None:
        self.index, self.plan, self.shards = index, plan, shards

    def __iter__(self) -> Iterator[Request]:
        size = self.plan.settings["batch_size"]
        for shard in self.shards:
            start, stop = self.plan.range(shard)
            for first in range(start, stop, size):
                last = min(first + size, stop)
                yield Request(shard, self.index.items(first, last), last == stop)


def pack(settings: Any) -> None:
    """Pack, finish packing, or extend. Raises UserError, ValueError or FileNotFoundError for what the user can correct."""
    ranks = Ranks()
    out: Path = settings.out
    begun = check_settings(out, settings)
    complete = begun is not None and is_complete(out, begun)
    if complete and not settings.extend:
        say(
            f"{out} is packed already: {begun.count} images (--verify re-reads it; --extend adds images that were added to "
            f"{settings.source})"
        )
        return
    if settings.extend and not complete and not (begun is not None and begun.extends):
        raise UserError(
            f"--extend: {out} holds no finished dataset to add images to; give the same command without --extend first"
        )
    _make_folder(out)
    if ranks.rank == 0:
        say(f"listing the images of {settings.source}")
        parts = index_source(out, settings, begun, extend=complete)
    kind, new = ranks.share(
        (parts[-1].kind, not complete or len(parts) > len(begun.parts)) if ranks.rank == 0 else None
    )
    if not new:
        say(f"{out}: all images of {settings.source} are packed already ({begun.count}); nothing to add")
        return
    device = torch.device(
        f"cuda:{ranks.local_rank % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"
    )
    networks = Networks(settings, has_moments=kind == "published", device=device)
    plan = ranks.share(make_plan(out, settings, parts, networks, begun) if ranks.rank == 0 else None)
    index = joined(read_parts(out, plan))
    todo = ranks.share(plan.unfinished(out) if ranks.rank == 0 else None)
    if ranks.rank == 0:
        say(messages.needs(out, plan, index, todo, device, ranks.world))
        check_room(out, plan, todo)
    own = todo[ranks.rank :: ranks.world]
    totals = pack_shards(out, index, plan, own, networks, settings, ranks)
    everyone = ranks.gather(totals)
    if ranks.rank == 0:
        write_class_means(out, plan, index)
        manifest = describe(out, plan, index)
        write_manifest(out, manifest)
        say(messages.summary(out, manifest.source, everyone))
    ranks.share(None)


def _make_folder(out: Path) -> None:
    """Raises UserError if nothing can be written there."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: the folder cannot be made ({error.strerror})") from error
    if not os.access(out, os.W_OK):
        raise UserError(f"--out {out}: the folder is read-only; give another --out")


def pack_shards(
    out: Path, index: Index, plan: Plan, shards: list[int], networks: Networks, settings: Any, ranks: Ranks
) -> Totals:
    """Write the given shards. settings: on_corrupt, max_pixels, num_workers, batch_size."""
    reader = Reader(index.kind, index.root, index.files)
    loader = DataLoader(
        CropDataset(reader, plan.settings["resolution"], settings.max_pixels),
        sampler=Requests(index, plan, shards),
        batch_size=None,
        collate_fn=as_is,
        num_workers=_workers(settings.num_workers, ranks),
        pin_memory=networks.device.type == "cuda",
    )
    batches = iter(loader)  # worker processes start here, before CUDA does and with as little memory as may be
    networks.place()
    count = sum(stop - start for start, stop in map(plan.range, shards))
    share = f" (1/{ranks.world} of the images)" if ranks.world > 1 else ""
    bar = progress(count, unit="image", description=f"packing{share}", shown=ranks.rank == 0)
    waiting, start = 0.0, time.monotonic()
    done, warm = 0, (0, start)  # images, and those of the first batch, which warms the device up, with its time
    tally: dict[int, dict[str, Any]] = {}
    with BackgroundWriter(out) as writer, bar:
        pending: Pending | None = None
        while True:
            clock = time.monotonic()
            crops: Crops | None = next(batches, None)
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
                    say(messages.forecast(done - warm[0], now - warm[1], count - done, ranks.world))
                elif warm == (0, start):
                    warm = done, now
            if following is None:
                break
            pending = following
    return Totals(count, time.monotonic() - start, waiting)


def _write(writer: BackgroundWriter, encoded: Encoded, plan: Plan, tally: dict[int, dict[str, Any]]) -> None:
    """Hand a batch to the writer; the last of a shard goes with the shard's notes."""
    crops = encoded.crops
    shard = crops.request.shard
    notes = tally.setdefault(shard, {"plan": plan.part(shard).id, "skipped": [], "enlarged": 0, "error": {}})
    notes["skipped"] += [list(bad) for bad in crops.bad]
    notes["enlarged"] += crops.enlarged
    for name, value in encoded.error.items():
        notes["error"][name] = max(value, notes["error"].get(name, 0.0))
    writer.put(shard, encoded.arrays, tally.pop(shard) if crops.request.last else None)


def _workers(wanted: int | None, ranks: Ranks) -> int:
    """Reading processes of one rank: by default the cores of this machine, shared among its ranks, but for one."""
    if wanted is not None:
        return max(wanted, 0)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(len(os.sched_getaffinity(0)) // local - 1, 0)

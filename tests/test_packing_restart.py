"""Packing that was interrupted, is finished already, or runs twice at a time."""

import errno
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from common.lock import FolderLock
from config import UserError
from packed.writer import ShardWriter
from preprocessing import pack, packing
from preprocessing.writer import BackgroundWriter
from tests.packs import IMAGES, content, flags, killed, torchrun, write_folder

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("when", [0, 2, 4, 7, 27, 63, 65])
def test_killed_packing_is_finished_by_the_same_command(toys, tmp_path, when):
    """kill -9 at a write of the index, the plan, a shard, an entry, the manifest: the result is that of an unbroken run."""
    assert killed(flags(toys, tmp_path / "out"), tmp_path / "log", when)
    pack.main(flags(toys, tmp_path / "out"))
    assert content(tmp_path / "out") == content(toys / "packed")


@pytest.mark.slow
def test_kill_sweep(toys, tmp_path):
    """kill -9 at every write to the disk, and then at random instants one after the other, with reading processes."""
    writes = 0
    while killed(flags(toys, tmp_path / f"at{writes}"), tmp_path / "log", writes):
        assert not (tmp_path / f"at{writes}" / "dataset.json").exists() or writes > 40
        pack.main(flags(toys, tmp_path / f"at{writes}"))
        assert content(tmp_path / f"at{writes}") == content(toys / "packed"), writes
        writes += 1
    assert writes > 40  # 3 shards of 5 fields, checksums and an entry, and index, plan, means, manifest: twice each
    rng = random.Random(0)
    kills = 0
    for trial in range(200):  # 25 folders, and as many more as it takes for 20 kills to land before the work is done
        if trial >= 25 and kills >= 20:
            break
        out = tmp_path / f"random{trial}"
        for _ in range(3):
            workers = ("--num-workers", str(trial % 3))
            kills += killed([*flags(toys, out), *workers], tmp_path / "log", rng.uniform(0.0, 0.2))
        pack.main(flags(toys, out))
        assert content(out) == content(toys / "packed"), trial
    print(f"{kills} random kills landed in {trial} folders")
    assert kills >= 20


@pytest.mark.slow
def test_killed_with_two_processes(toys, tmp_path):
    """Two processes killed together, finished by one and by two: the same bytes."""
    for world in (1, 2):
        out = tmp_path / f"out{world}"
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(random.randint(20000, 60000)),
        }
        # without torchrun, which gives each process a session of its own and, killed, leaves them running
        ranks = [
            subprocess.Popen(
                [sys.executable, "-m", "preprocessing.pack", *flags(toys, out)],
                cwd=ROOT,
                env={**environment, "RANK": rank, "LOCAL_RANK": rank},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            for rank in "01"
        ]
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not list(out.glob("shard-*.json")):
            time.sleep(0.001)
        for process in ranks:
            process.kill()
            process.wait()
        assert list(out.glob("shard-*.json"))
        if world == 1:
            pack.main(flags(toys, out))
        else:
            assert torchrun(2, flags(toys, out)).returncode == 0
        assert content(out) == content(toys / "packed")


def test_two_packings_of_one_folder(toys, tmp_path, capsys):
    """While one writes, another is refused by the name of the first; a finished folder can be asked about at any time."""
    out = shutil.copytree(toys / "packed", tmp_path / "out")
    lock = FolderLock(out, packing.LOCK, "")
    pack.main(flags(toys, out))
    assert "packed already" in capsys.readouterr().out
    (out / "dataset.json").unlink()
    for more in ((), ("--repair",)):
        with pytest.raises(UserError, match=f"out is in use by process {os.getpid()} on .*; wait until it has ended"):
            pack.main(flags(toys, out, *more))
    lock.close()
    pack.main(flags(toys, out))
    assert content(out) == content(toys / "packed")


def test_nothing_is_written_after_an_error(tmp_path, monkeypatch):
    """Batches that wait behind one that failed are not appended: the shard would lack records and still look whole."""
    real, calls = ShardWriter.append, []

    def append(self, arrays):
        calls.append(len(arrays["label"]))
        if len(calls) == 2:
            time.sleep(0.2)
            raise OSError(errno.ENOSPC, "No space left on device")
        real(self, arrays)

    monkeypatch.setattr(ShardWriter, "append", append)
    with pytest.raises(UserError, match=r"the disk is full at .*finished shards are kept"):
        with BackgroundWriter(tmp_path) as writer:
            for size, notes in ((1, None), (2, None), (3, None), (4, {"plan": ""})):
                writer.put(0, {"label": np.arange(size)}, notes)
    assert calls == [1, 2] and not list(tmp_path.iterdir())


def test_finished_packing_is_left_alone(toys, capsys):
    """The same command again reads no image and writes nothing."""
    before = {path: path.stat().st_mtime_ns for path in (toys / "packed").iterdir()}
    pack.main(flags(toys, toys / "packed"))
    assert "packed already: 15 images" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in (toys / "packed").iterdir()}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--batch-size", "5"), "was begun with --batch-size 4, now it is 5"),
        (("--resolution", "16"), "was begun with --resolution 8, now it is 16"),
        (("--no-tokens",), "was begun with --enc-type"),
    ],
)
def test_other_flags_are_refused(toys, more, message):
    """One dataset is of one kind: a flag that would change records is named."""
    with pytest.raises(UserError, match=message):
        pack.main(flags(toys, toys / "packed", *more))


def test_changed_weights_and_images_are_refused(toys, tmp_path):
    """Networks or images that are not those of the first start are refused."""
    out = tmp_path / "out"
    shutil.copytree(toys / "vae", tmp_path / "vae")
    arguments = flags(toys, out, "--vae", str(tmp_path / "vae"), source=write_folder(tmp_path / "images", IMAGES))
    assert killed(arguments, tmp_path / "log", 20)
    torch.manual_seed(7)
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(tmp_path / "vae")
    torch.nn.init.normal_(vae.quant_conv.weight)
    vae.save_pretrained(tmp_path / "vae")
    with pytest.raises(UserError, match="--vae: its weights are not those"):
        pack.main(arguments)
    (out / "index.npz").unlink()
    (tmp_path / "images/ant/0.png").unlink()
    with pytest.raises(UserError, match="its images are not those"):
        pack.main(arguments)

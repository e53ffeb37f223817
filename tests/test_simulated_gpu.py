"""On a simulated GPU: what a step launches, that it never waits, and that the programs run from end to end."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import simulated
from config import UserError
from tests.test_architecture import ROOT
from tests.tiny import train_flags, write_dataset, write_vae
from tests.toy_model import CONFIG, write_model
from tests.toy_model import flags as sample_flags


@pytest.fixture(scope="module")
def device(tmp_path_factory):
    """The library of the device."""
    try:
        return simulated.build(tmp_path_factory.mktemp("simulated"))
    except UserError as error:
        pytest.skip(str(error))


def on_device(device: Path, code: str, *arguments: str) -> str:
    """Output of Python code in a process with the device."""
    code = f"import sys\nfrom benchmarks import simulated\nsimulated.set_up()\n{code}"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env=simulated.environment(device),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


STEP = """
import torch
from benchmarks.train_variants import OurStep
from tests.test_speed import SIX_BLOCKS
from training.tracking import Window
for precision in ("bf16", "fp16"):
    ours = OurStep(SIX_BLOCKS, 8, "cuda", precision=precision)
    window = Window(torch.device("cuda"))
    ours()
    torch.cuda.set_sync_debug_mode("error")
    simulated.reset()
    result = ours()
    found = simulated.by_name()
    window.add(1, result, ours.positions)
    torch.cuda.set_sync_debug_mode("default")
    pageable = sum(n for name, n in found.items() if "pageable" in name)
    print(precision, *simulated.counts(found), pageable)
print("GiB", torch.cuda.max_memory_allocated() / 2**30)
"""

GRAPH = """
from config import UserError
from training.graph import WARM_UP, capture
ours = OurStep(SIX_BLOCKS, 8, "cuda", precision="bf16", graph=True)
for _ in range(WARM_UP + 1):
    ours()
torch.cuda.set_sync_debug_mode("error")
simulated.reset()
ours()
print("replay", *simulated.counts(), simulated.by_name()["graph:launch"])
torch.cuda.set_sync_debug_mode("default")
x = torch.ones(3, device="cuda")
for step in (lambda: x.sum().item(), lambda: x + torch.ones(3).cuda(), lambda: torch.empty(2**45, device="cuda")):
    try:
        capture(step)
    except UserError as error:
        print(error)
"""


def test_a_step_never_waits_and_copies_nothing_from_the_host(device):
    """A wait would raise; a copy from pageable memory is one that no CUDA graph can hold. A step is captured as one graph,
    and its replay is a few launches."""
    *steps, memory, replay, waits, copies, large = on_device(device, STEP + GRAPH).splitlines()
    for line in steps:
        _, launches, products, waited, pageable = line.split()
        assert 0 < int(products) < int(launches) < 1200 and int(waited) == int(pageable) == 0, line
    assert 0.001 < float(memory.split()[1]) < 1
    launches, products, waited, graphs = map(int, replay.split()[1:])
    assert launches <= 16 and (products, waited, graphs) == (0, 0, 1)
    for line in (waits, copies):
        assert re.match(r"the step cannot be captured as a CUDA graph \(.* captur.*\): leave --cuda-graph out", line), (
            line
        )
    assert large.startswith("the GPU's memory does not suffice for the CUDA graph of a step: give a larger --grad")


FEED = """
import time
import numpy as np
import torch
from torch.cuda import _sanitizer
from dataset import PackedDataset, read_ahead
dataset, order, tensors = PackedDataset(sys.argv[1]), [np.arange(4) + i for i in range(12)], 5
torch.cuda.set_sync_debug_mode("error")
simulated.reset()
stream, begin = read_ahead(dataset, order, threads=2, device="cuda"), time.monotonic()
next(stream)
while simulated.counts().launches < 4 * tensors and time.monotonic() < begin + 60:  # this thread only looks on
    time.sleep(0.01)
print(simulated.counts().launches // tensors, end=" ")
assert sum(1 for _ in stream) == 11
found = simulated.by_name()
assert found["copy:cudaMemcpyAsync pinned->dev"] == simulated.counts(found).launches == 12 * tensors, found
# an event of the host's allocator for each tensor copied, one for each batch, and one for each tensor that is let go
print(found["event:record"] - 12 * (tensors + 1), found["event:wait"], simulated.counts(found).synchronisations)
_sanitizer.enable_cuda_sanitizer()  # of torch: raises where two streams touch a tensor in no certain order
for waits in (True, False):
    try:
        for batch in read_ahead(dataset, order[:2], threads=0, device="cuda"):
            batch.moments.float().sum() + batch.class_token[0].sum()
        print("ordered")
    except _sanitizer.CUDASanitizerErrors:
        print("a race")
    torch.cuda.Stream.wait_event = lambda *a: None
"""


def test_batches_are_copied_ahead_on_a_stream_of_their_own(device, tmp_path):
    """Four batches are on their way before the second is asked for. The step's stream waits for each by an event, the host
    never, and its use of each tensor is recorded, so that no later copy overwrites it; without the event it is a race."""
    said = on_device(device, FEED, str(write_dataset(tmp_path / "data"))).splitlines()
    assert said == [f"4 {12 * 5} 12 0", "ordered", "a race"]


PROGRAMS = """
import torch, train, generate
from training import previews, run
run.check_weights = lambda *a: None  # the device has no values: neither finite weights nor a nearest class
previews.nearest_class = lambda tokens, means: torch.zeros(len(tokens), dtype=torch.int64)
cut = sys.argv.index("then")
train.main(sys.argv[1:cut])
assert torch.cuda.max_memory_allocated() > 0
generate.main(sys.argv[cut + 1 :])
"""


@pytest.mark.slow
def test_programs_run_from_end_to_end(device, tools, tmp_path):
    """train.py with previews and a CUDA graph, and generate.py, with every tensor where it belongs."""
    write_vae(tmp_path / "vae", scaling_factor=0.5)
    write_model(tmp_path, "m", CONFIG, means=False)
    more = ("--sampling-steps", "2", "--preview-steps", "2", "--no-compile", "--cuda-graph", "--num-workers", "2")
    trained = train_flags(tools["data"], tmp_path, *more)
    sampled = sample_flags(tmp_path, tmp_path / "s", "--device", "cuda", "--dtype", "bf16", "--no-compile")
    on_device(device, PROGRAMS, *trained, "then", *sampled)
    assert (tmp_path / "run" / "previews" / "step_0000002.png").is_file()
    assert (tmp_path / "s" / "samples.npz").is_file()


START = """
import re, threading, time
from pathlib import Path
from config import parse
from training import run, setup
from training.settings import TrainConfig
run.check_weights = lambda *a: None

def memory():  # of the host: what is neither device memory (shared) nor mapped from files
    return int(re.search(r"RssAnon:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

before, peak, done = memory(), 0, False

def watch():
    global peak
    while not done:
        peak = max(peak, memory())
        time.sleep(0.001)

thread = threading.Thread(target=watch)
thread.start()
with setup.prepare(parse(TrainConfig, "", sys.argv[1:])) as run:
    done = True
    thread.join()
    print(run.step, (peak - before) / sum(p.numel() for p in run.train_step.parameters))
    if run.step == 0:
        run.advance()
        run.save()
"""


@pytest.mark.slow
def test_a_start_takes_the_memory_of_the_host_once(device, tools, tmp_path):
    """Bytes per parameter: a fresh start makes the float32 weights in host memory, the EMA on the GPU; a resume maps the 16
    bytes of a checkpoint, and goes straight from the files to the GPU."""
    wide = ("--depth", "4", "--hidden-size", "768", "--num-heads", "12", "--no-compile")
    for step, limit in ((0, 5), (1, 1)):
        said = on_device(device, START, *train_flags(tools["data"], tmp_path, *wide, steps=1)).splitlines()[-1].split()
        assert int(said[0]) == step and 0 < float(said[1]) < limit, said


COMPILED = """
import torch
from torch._dynamo.utils import counters
from dataclasses import replace
from benchmarks.train_variants import OurStep
from config import UserError
from models.acceleration import check_norm_kernel, decide_compile
from models.sit import preset
assert decide_compile(None, "cuda")
counters.clear()
config, norm_kernel = replace(preset("SiT-B/2"), depth=3, align_depth=2), "norm kernel" in sys.argv
if norm_kernel:
    from models import norm_kernel as kernels
    check_norm_kernel(768, "bf16", torch.device("cuda"), True)
    kernels.STAGES, usual = 40, kernels.STAGES  # take more of a multiprocessor's memory than there is
    try:
        check_norm_kernel(768, "bf16", torch.device("cuda"), True)
    except UserError as error:
        print(error)
    kernels.STAGES = usual
ours = OurStep(config, 8, "cuda", precision="bf16", compiled=True, norm_kernel=norm_kernel)
for _ in range(2):
    ours()
torch.cuda.set_sync_debug_mode("error")
simulated.reset()
ours()
print(*simulated.counts(), counters["stats"]["unique_graphs"])
"""


@pytest.mark.slow
@pytest.mark.parametrize("kernel", [False, True])
def test_a_compiled_step_is_a_few_graphs(device, kernel):
    """Six graphs, with --norm-kernel eight, three of them of the three blocks; at most 45 launches a block and 115 beside
    them, so 655 at the depth of B/2. A GPU that does not run the kernels is found before."""
    *said, counts = on_device(device, COMPILED, "norm kernel" * kernel).splitlines()
    launches, products, waits, graphs = map(int, counts.split())
    assert 50 < products < launches <= 115 + 3 * 45 and waits == 0
    assert graphs == (8 if kernel else 6)
    if kernel:
        assert re.match(
            r"the kernels of --norm-kernel do not run on this GPU \(out of resource: sh.*\): leave", said[-1]
        )


def test_without_gcc_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="compiled by gcc, which is not installed"):
        simulated.build(tmp_path)

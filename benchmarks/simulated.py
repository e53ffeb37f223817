"""A simulated NVIDIA GPU: kernels are counted and do nothing. Everything above them is real: torch's dispatcher, autograd,
caching allocator and synchronisation checks, Dynamo, Inductor and Triton for sm_90.

It gives launches, copies, synchronisations, graphs and peak memory; neither values nor times. Needs gcc and the CUDA build
of torch. The sources are in tests/simulated_gpu/.
"""

import ctypes
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from config import UserError

SOURCES = Path(__file__).parents[1] / "tests" / "simulated_gpu"
LIBRARY = "libcuda.so.1"


class Counts(NamedTuple):
    """What a piece of code asked of the device: kernel launches in all (copies and fills included), matrix products among
    them, and waits of the host for the device."""

    launches: int
    products: int
    synchronisations: int


def build(folder: Path) -> Path:
    """Compile the device into a folder and return its library. Raises UserError where gcc or CUDA's headers are missing."""
    if shutil.which("gcc") is None:
        raise UserError("the simulated GPU is compiled by gcc, which is not installed")
    site = Path(sysconfig.get_paths()["purelib"])
    headers = [*site.glob("nvidia/*/include"), *Path("/usr/local").glob("cuda*/include")]
    folder.mkdir(parents=True, exist_ok=True)
    out = folder / LIBRARY
    sources = [str(SOURCES / name) for name in ("device.c", "stubs.c")]
    flags = ["-shared", "-fPIC", "-O1", "-w", f"-Wl,-soname,{LIBRARY}", *(f"-I{path}" for path in headers)]
    done = subprocess.run(
        ["gcc", *flags, "-o", str(out), *sources, "-ldl", "-lpthread"], capture_output=True, text=True
    )
    if done.returncode:
        first = done.stderr.strip().splitlines()[0] if done.stderr.strip() else "no message"
        raise UserError(f"the simulated GPU cannot be compiled ({first}): it needs the CUDA build of torch")
    return out


def environment(library: Path, *, gib: float = 141, name: str = "NVIDIA H200") -> dict[str, str]:
    """Variables of a process that sees the simulated device.

    Args:
        library: what `build` returned.
        gib: memory of the device.
        name: of the device.
    """
    return {
        **os.environ,
        "LD_PRELOAD": str(library),
        "LD_LIBRARY_PATH": str(library.parent),
        "TRITON_LIBCUDA_PATH": str(library.parent),
        "SIMULATED_GIB": str(gib),
        "SIMULATED_NAME": name,
    }


def present() -> bool:
    """Whether this process sees the simulated device."""
    return Path(os.environ.get("LD_PRELOAD", "")).name == LIBRARY


def restart(module: str, folder: Path, gib: float) -> None:
    """Start this process anew with the simulated device, unless it has it already."""
    if not present():
        arguments = [sys.executable, "-m", module, *sys.argv[1:]]
        os.execve(sys.executable, arguments, environment(build(folder), gib=gib))


def set_up() -> None:
    """Turn off what the device has no counterpart for: cuDNN; flash attention takes the place of cuDNN's."""
    import torch

    torch.backends.cudnn.enabled = False
    torch.backends.cuda.enable_cudnn_sdp(False)


def reset() -> None:
    """Count from 0."""
    _device().simulated_reset()


def by_name() -> dict[str, int]:
    """Entry points, kernels and matrix products that were called since `reset`."""
    device = _device()
    found = {device.simulated_name(i).decode(): device.simulated_n(i) for i in range(device.simulated_size())}
    return {name: count for name, count in found.items() if count}


def counts(found: Mapping[str, int] | None = None) -> Counts:
    """Totals of `by_name`."""
    found = by_name() if found is None else found
    products = sum(n for name, n in found.items() if name.startswith("gemm:"))
    others = ("kernel:", "memset", "copy:cudaMemcpyAsync")
    launched = sum(n for name, n in found.items() if name.startswith(others))
    return Counts(launched + products, products, sum(n for name, n in found.items() if name.startswith("sync:")))


def _device() -> ctypes.CDLL:
    device = ctypes.CDLL(LIBRARY)
    device.simulated_name.restype = ctypes.c_char_p
    device.simulated_n.restype = ctypes.c_long
    return device

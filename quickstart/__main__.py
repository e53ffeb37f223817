"""Digits from end to end: images, small networks, packing, training, sampling, evaluation, one table and a report.

Every stage is a program of this project, run by the command that is printed. See `bash quickstart.sh --help`.
"""

import argparse
import os
import shutil
from pathlib import Path

from common.presets import GUIDANCE_HIGH, GUIDANCE_SCALE
from quickstart.stages import Runner, Stage

SAMPLERS = {  # name => generate.py's flags
    "sde": ("--mode", "sde", "--num-steps", "50"),
    "ode": ("--mode", "ode", "--num-steps", "50"),
}
GUIDANCE = {
    "unguided": ("--cfg-scale", "1.0"),
    "guided": (
        "--cfg-scale",
        str(GUIDANCE_SCALE),
        "--cls-cfg-scale",
        str(GUIDANCE_SCALE),
        "--guidance-low",
        "0.0",
        "--guidance-high",
        str(GUIDANCE_HIGH),
    ),
}
EARLY = 500  # steps after which --compare judges too: at the end of the run all rows have converged
RUNS = {  # rows of the paper's ablation => train.py's flags
    "reg": (),
    "repa": ("--no-class-token",),
    "sit": ("--no-class-token", "--proj-coeff", "0"),
}


def prepare(out: Path) -> list[Stage]:
    """Images, the three small networks and the packed dataset."""
    images, networks = out / "images", out / "networks"
    stages = [Stage("images", ("python", "-m", "quickstart.digits", str(images)), (images / "test.npz",))]
    for name in ("vae", "encoder", "judge"):
        command = ("python", "-m", "quickstart.toy_networks", name, str(images / "train"), str(networks / name))
        stages.append(Stage(name, command, (networks / name / "figures.json",), ("images",)))
    pack = (
        "python",
        "preprocessing/pack.py",
        "--source",
        str(images / "train"),
        "--out",
        str(out / "packed"),
        "--resolution",
        "16",
        "--vae",
        str(networks / "vae"),
        "--enc-type",
        str(networks / "encoder"),
        "--no-compile",
    )
    return [*stages, Stage("pack", pack, (out / "packed" / "dataset.json",), ("images", "vae", "encoder"))]


def train_and_sample(out: Path, run: str, gpu: bool, samples: int, early: bool = False) -> list[Stage]:
    """Train one row and sample it with each solver, with and without guidance; early: also after EARLY steps, unguided."""
    launcher = (
        "accelerate",
        "launch",
        "--num_processes",
        "1",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--num_cpu_threads_per_process",
        str(os.cpu_count() or 1),
        *(() if gpu else ("--cpu",)),
    )
    train = (
        *launcher,
        "train.py",
        "--config",
        "recipes/digits.yaml",
        "--data-dir",
        str(out / "packed"),
        "--output-dir",
        str(out),
        "--exp-name",
        run,
        *RUNS[run],
    )
    stages = [Stage(f"train-{run}", train, (out / run / "checkpoints",), ("pack",))]
    judged = [(out / run, sampler, guidance) for sampler in SAMPLERS for guidance in GUIDANCE]
    judged += [(out / run / "checkpoints" / f"{EARLY:07d}", "ode", "early")] if early else []
    for checkpoint, sampler, guidance in judged:
        solver, scales = SAMPLERS[sampler], GUIDANCE["unguided" if guidance == "early" else guidance]
        name = f"{run}-{sampler}-{guidance}"
        folder = out / "samples" / name
        command = (
            "torchrun",
            "--nproc_per_node=1",
            "generate.py",
            "--checkpoint",
            str(checkpoint),
            "--out",
            str(folder),
            "--num-fid-samples",
            str(samples),
            "--per-proc-batch-size",
            "125",
            "--labels",
            "balanced",
            "--no-compile",
            *solver,
            *scales,
        )
        stages.append(Stage(f"sample-{name}", command, (folder / "samples.npz",), (f"train-{run}",)))
        stages.append(evaluate(out, name, folder / "samples.npz", (f"sample-{name}",)))
    return stages


def evaluate(out: Path, name: str, samples: Path, after: tuple[str, ...]) -> Stage:
    """Class accuracy by the judge, and the Frechet distance to the held-out digits in its features."""
    results = out / "evaluations" / f"{name}.json"
    judge = str(out / "networks" / "judge")
    command = (
        "python",
        "evaluations/evaluate.py",
        "--reference",
        str(out / "images" / "test.npz"),
        "--samples",
        str(samples),
        "--features",
        f"timm:{judge}",
        "--classifier",
        judge,
        "--out",
        str(results),
    )
    return Stage(f"evaluate-{name}", command, (results,), (*after, "judge"))


def main() -> None:
    parser = argparse.ArgumentParser(prog="bash quickstart.sh", description=__doc__)
    parser.add_argument("--fresh", action="store_true", help="delete the output folder and start over")
    parser.add_argument(
        "--compare", action="store_true", help="also train plain SiT and REPA, and judge all rows early too"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), metavar="DIR", help="output folder")
    parser.add_argument("--samples", type=int, default=500, metavar="N", help="images for each sampler setting")
    settings = parser.parse_args()
    if settings.samples < 100:
        parser.error(f"--samples {settings.samples}: a Frechet distance of fewer than 100 images says nothing")
    out = settings.out
    if settings.fresh:
        shutil.rmtree(out, ignore_errors=True)

    import torch

    gpu = torch.cuda.is_available()
    # Threads that sleep instead of spin: on a busy machine, spinning ones make a step 30 times slower.
    runner = Runner(out, {"OMP_WAIT_POLICY": "PASSIVE", "WANDB_MODE": "offline", "TQDM_MININTERVAL": "1"})
    for stage in prepare(out):
        runner.run(stage)
    for name, part in (("held-out", "test"), ("train", "train")):
        runner.run(evaluate(out, name, out / "images" / f"{part}.npz", ("images",)))
    runs = ("sit", "repa", "reg") if settings.compare else ("reg",)
    for run in runs:
        for stage in train_and_sample(out, run, gpu, settings.samples, early=settings.compare):
            runner.run(stage)

    from quickstart.summary import summarize

    print("\n" + summarize(out, runs, list(runner.records.values()), gpu))


if __name__ == "__main__":
    main()

"""Sample images from a model file: `python generate.py --checkpoint RUN --out DIR --preset preview`.

Sample i is a function of the settings, the seed and i: the same images on any number of processes, at any batch size and
after any interruption. Writes samples.npz, samples.json, grid.png and gallery.html; see docs/sampling.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.presets import GUIDANCE_SCALE, PRESETS
from common.reporting import run
from config import UserError, parse, setting

EXAMPLES = (
    "python generate.py --checkpoint runs/reg-b2 --out samples/preview --preset preview",
    "torchrun --nproc_per_node=8 generate.py --checkpoint runs/reg-b2 --out samples/reg-b2 --preset paper",
)


@dataclass(frozen=True)
class SampleConfig:
    checkpoint: Path = setting(
        help="model file, checkpoint or run folder (its newest), published .pt, or hub OWNER/NAME[/FILE]",
        group="what",
        also=("ckpt", "ckpt_path", "checkpoint_path", "model", "model_path", "resume", "run"),
    )
    out: Path = setting(
        help="folder to write; the same command again continues there",
        group="what",
        also=("o", "output", "output_dir", "outdir", "out_dir", "sample_dir", "save_dir"),
    )
    preset: str | None = setting(
        None,
        "values for settings that neither a flag nor the recipe gives. preview: 16 guided pictures in 50 steps, "
        "labels spread over the classes, bf16 where the GPU has it; paper: 50,000 samples, 250 SDE steps, guidance "
        "2.3 on t in [0, 0.85]",
        group="what",
        choices=tuple(PRESETS),
    )
    num_fid_samples: int = setting(
        50_000,
        "number of samples",
        group="what",
        also=("n", "num", "count", "num_samples", "num_images", "n_samples", "samples"),
    )
    seed: int = setting(0, "of noise and labels", group="what", also=("global_seed", "random_seed"))
    labels: tuple[str, ...] = setting(
        (),
        "random, balanced (classes in turn), spread (few samples evenly over all classes, or those that the tokens "
        "of --like name), null (unconditional), class numbers or names, or a file of numbers; default: random",
        group="what",
        also=("label", "class_labels", "class_label", "y"),
    )
    classes: tuple[str, ...] = setting(
        (), "draw from these classes only, numbers or names; default: all", group="what", also=("class", "class_ids")
    )

    mode: str = setting(
        "sde", "reverse SDE or probability-flow ODE", group="solver", choices=("sde", "ode"), also=("sampling_mode",)
    )
    solver: str = setting(
        "euler",
        "sde: euler (Euler-Maruyama), dpmpp; ode: euler, heun, dpmpp, dopri5",
        group="solver",
        also=("sampler", "sampling_method", "scheduler"),
    )
    heun: bool = setting(False, "the same as --solver heun", group="solver")
    num_steps: int = setting(
        250,
        "steps of the solver",
        group="solver",
        also=("steps", "nfe", "num_sampling_steps", "sampling_steps", "num_inference_steps"),
    )
    time_grid: str = setting("uniform", "spacing of the steps", group="solver", choices=("uniform", "shifted"))
    shift: float = setting(1.0, "of the shifted grid; above 1: more steps near noise", group="solver")
    t_last: float = setting(0.04, "sde: the last time before 0", group="solver")
    diffusion: str = setting(
        "linear", "sde: diffusion coefficient", group="solver", choices=("linear", "sigma", "constant")
    )
    diffusion_scale: float = setting(1.0, "sde: factor on it", group="solver")
    last_step: str = setting("drift", "sde: published, or along the velocity", group="solver", choices=("drift", "ode"))
    rtol: float = setting(1e-3, "dopri5: relative tolerance", group="solver")
    atol: float = setting(1e-3, "dopri5: absolute tolerance", group="solver")

    cfg_scale: float | None = setting(
        1.0, "guidance scale; 1: none", group="guidance", also=("cfg", "guidance", "guidance_scale", "scale", "w")
    )
    cls_cfg_scale: float | None = setting(
        None, "the class token's; 0 means 1, as published; default: as --cfg-scale", group="guidance"
    )
    guidance_low: float = setting(0.0, "guide from this t on", group="guidance")
    guidance_high: float = setting(1.0, "guide up to this t", group="guidance")
    cls_guidance_low: float | None = setting(None, "the class token's; default: the same", group="guidance")
    cls_guidance_high: float | None = setting(None, "the class token's; default: the same", group="guidance")
    guide_checkpoint: Path | None = setting(
        None, "autoguidance: a weaker model instead of the null label", group="guidance"
    )

    class_tokens: bool = setting(False, "write class_tokens.npy and class_token_labels.npy", group="class token")
    best_of: int = setting(
        1, "candidates per sample, of which the one whose token fits its label best is kept", group="class token"
    )
    like: tuple[str, ...] = setting(
        (), "fix the class token: images, or .npy files of tokens (FILE.npy:ROW)", group="class token"
    )
    interpolate: int = setting(
        0, "samples per noise on the way from the first to the second token of --like", group="class token"
    )

    png: bool = setting(False, "also write png/000000.png ...", group="files")
    gallery: int = setting(200, "pictures in gallery.html; 0: no gallery", group="files")
    keep_parts: bool = setting(False, "keep the folder of finished parts after the end", group="files")

    per_proc_batch_size: int = setting(
        32, "samples at once in each process", group="machine", also=("bs", "b", "batch", "batch_size")
    )
    device: str = setting("auto", "where to run", group="machine", choices=("auto", "cpu", "cuda"))
    dtype: str = setting(
        "fp32",
        "arithmetic of the network; auto: bf16 where the GPU has it, else fp32",
        group="machine",
        choices=("auto", "fp32", "bf16", "fp16"),
        also=("precision", "mixed_precision", "bf16", "fp16"),
    )
    tf32: bool = setting(True, "TF32 matrix products for float32 on GPUs, as published", group="machine")
    compile: bool = setting(False, "torch.compile the network", group="machine")
    vae: str | None = setting(None, "where the model's VAE is; default: as at packing", group="machine")
    vae_dtype: str = setting("fp32", "arithmetic of the decoder", group="machine", choices=("fp32", "bf16", "fp16"))
    vae_batch_size: int = setting(0, "latents decoded at once; 0: the whole batch", group="machine")
    vae_tiling: bool = setting(False, "decode in tiles: less memory at large sizes", group="machine")


def check(settings: SampleConfig) -> None:
    """Raise UserError for what can be seen without the model."""
    s = settings
    for name, least in (
        ("num_fid_samples", 1),
        ("per_proc_batch_size", 1),
        ("best_of", 1),
        ("gallery", 0),
        ("vae_batch_size", 0),
        ("interpolate", 0),
        ("seed", 0),
    ):
        if getattr(s, name) < least:
            raise UserError(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(s, name)}")
    if s.heun and s.solver not in ("euler", "heun"):
        raise UserError(f"--heun contradicts --solver {s.solver}")
    if s.heun and s.mode == "sde":
        raise UserError("--heun is a solver of --mode ode")
    if s.interpolate == 1 or (s.interpolate and len(s.like) > 2):
        raise UserError("--interpolate needs at least 2 samples on the way between the two tokens of --like")
    if s.interpolate and not s.like:
        raise UserError("--interpolate needs --like with the two tokens to go between")
    if s.best_of > 1 and s.like:
        raise UserError("--best-of chooses by the generated token, --like fixes it: give one of them")


def read(argv: Sequence[str] | None = None) -> SampleConfig:
    """The settings of a command line, checked. Raises UserError."""
    settings = parse(SampleConfig, "Sample images from a model file.", argv, examples=EXAMPLES, presets=PRESETS)
    check(settings)
    return settings


def main(argv: Sequence[str] | None = None) -> None:
    settings = read(argv)
    from common.reporting import say
    from sampling.job import Request, generate

    generate(Request(**requested(settings)), say=say)


def requested(s: SampleConfig) -> dict[str, Any]:
    """The fields of sampling.job.Request that the settings mean."""
    from models.guidance import Guidance
    from models.samplers import Solver
    from models.solvers import Diffusion
    from sampling.loading import Precision

    solver = Solver(
        s.mode,
        "heun" if s.heun else s.solver,
        s.num_steps,
        s.time_grid,
        s.shift,
        s.t_last,
        Diffusion(s.diffusion, s.diffusion_scale),
        s.last_step,
        s.rtol,
        s.atol,
    )
    class_scale = 1.0 if s.cls_cfg_scale == 0 else s.cls_cfg_scale
    guidance = Guidance(
        GUIDANCE_SCALE if s.cfg_scale is None else s.cfg_scale,
        class_scale,
        s.guidance_low,
        s.guidance_high,
        s.cls_guidance_low,
        s.cls_guidance_high,
    )
    same = (
        "checkpoint",
        "out",
        "preset",
        "seed",
        "labels",
        "classes",
        "guide_checkpoint",
        "class_tokens",
        "best_of",
        "like",
        "interpolate",
        "png",
        "gallery",
        "keep_parts",
        "device",
        "vae",
    )
    return {
        "solver": solver,
        "guidance": guidance,
        "guidance_optional": s.cfg_scale is None,
        "count": s.num_fid_samples,
        "batch_size": s.per_proc_batch_size,
        "precision": Precision(s.dtype, s.tf32, s.compile, s.vae_dtype, s.vae_batch_size, s.vae_tiling),
        **{name: getattr(s, name) for name in same},
    }


if __name__ == "__main__":
    run(main)

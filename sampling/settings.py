"""Settings of generate.py, and what they mean before a model is known; without torch."""

from dataclasses import dataclass, replace
from pathlib import Path

from common.presets import GUIDANCE_SCALE, PRESETS
from config import RUN, UserError, setting
from models.choices import DEVICES, DIFFUSIONS, GRIDS, LAST_STEPS, MODES, PRECISIONS


@dataclass(frozen=True)
class SampleConfig:
    """Settings of role RESULT are recorded under their names; of files, the digest of the content is recorded instead."""

    checkpoint: Path = setting(
        help="model file, checkpoint or run folder (its newest), published .pt, or hub OWNER/NAME[/FILE]",
        group="what",
        role=RUN,
        also=("ckpt", "ckpt_path", "checkpoint_path", "model", "model_path", "resume", "run"),
    )
    out: Path = setting(
        help="folder to write; the same command again continues there",
        group="what",
        role=RUN,
        also=("o", "output", "output_dir", "outdir", "out_dir", "sample_dir", "save_dir"),
    )
    preset: str | None = setting(
        None,
        "values for settings that neither a flag nor the recipe gives. preview: 16 guided pictures in 50 steps, "
        "labels spread over the classes, bf16 where the GPU has it; paper: 50,000 samples, 250 SDE steps, guidance "
        "2.3 on t in [0, 0.85]",
        group="what",
        role=RUN,
        choices=tuple(PRESETS),
    )
    num_fid_samples: int = setting(
        50_000,
        "number of samples",
        group="what",
        role=RUN,
        at_least=1,
        also=("n", "num", "count", "num_samples", "num_images", "n_samples", "samples"),
    )
    seed: int = setting(0, "of noise and labels", group="what", at_least=0, also=("global_seed", "random_seed"))
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
        "sde", "reverse SDE or probability-flow ODE", group="solver", choices=MODES, also=("sampling_mode",)
    )
    solver: str = setting(
        "euler",
        "sde: euler (Euler-Maruyama), dpmpp; ode: euler, heun, dpmpp, dopri5",
        group="solver",
        also=("sampler", "sampling_method", "scheduler"),
    )
    heun: bool = setting(False, "the same as --solver heun", group="solver", role=RUN)
    num_steps: int = setting(
        250,
        "steps of the solver",
        group="solver",
        at_least=1,
        also=("steps", "nfe", "num_sampling_steps", "sampling_steps", "num_inference_steps"),
    )
    time_grid: str = setting("uniform", "spacing of the steps", group="solver", choices=GRIDS)
    shift: float = setting(1.0, "of the shifted grid; above 1: more steps near noise", group="solver", above=0)
    t_last: float = setting(0.04, "sde: the last time before 0", group="solver", above=0, below=1)
    diffusion: str = setting("linear", "sde: the diffusion coefficient", group="solver", choices=DIFFUSIONS)
    diffusion_scale: float = setting(1.0, "sde: a factor on it", group="solver", at_least=0)
    last_step: str = setting("drift", "sde: published, or along the velocity", group="solver", choices=LAST_STEPS)
    rtol: float = setting(1e-3, "dopri5: relative tolerance", group="solver", above=0)
    atol: float = setting(1e-3, "dopri5: absolute tolerance", group="solver", above=0)

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
        None, "autoguidance: a weaker model instead of the null label", group="guidance", role=RUN
    )

    class_tokens: bool = setting(
        False, "write class_tokens.npy and class_token_labels.npy", group="class token", role=RUN
    )
    best_of: int = setting(
        1,
        "candidates per sample, of which the one whose token fits its label best is kept",
        group="class token",
        at_least=1,
    )
    like: tuple[str, ...] = setting(
        (), "fix the class token: images, or .npy files of tokens (FILE.npy:ROW)", group="class token"
    )
    interpolate: int = setting(
        0,
        "samples per noise on the way from the first to the second token of --like",
        group="class token",
        at_least=0,
    )

    png: bool = setting(False, "also write png/000000.png ...", group="files", role=RUN)
    gallery: int = setting(200, "pictures in gallery.html; 0: no gallery", group="files", role=RUN, at_least=0)
    keep_parts: bool = setting(False, "keep the folder of finished parts after the end", group="files", role=RUN)

    per_proc_batch_size: int = setting(
        32,
        "samples at once in each process",
        group="machine",
        role=RUN,
        at_least=1,
        also=("bs", "b", "batch", "batch_size"),
    )
    device: str = setting("auto", "where to run", group="machine", role=RUN, choices=DEVICES)
    dtype: str = setting(
        "fp32",
        "arithmetic of the network; auto: bf16 where the GPU has it, else fp32",
        group="machine",
        choices=("auto", *PRECISIONS),
        also=("precision", "mixed_precision", "bf16", "fp16"),
    )
    tf32: bool = setting(True, "TF32 matrix products for float32 on GPUs, as published", group="machine")
    compile: bool | None = setting(
        None,
        "torch.compile the network; auto: on a GPU, for 1,000 images of 50 steps or more",
        group="machine",
        role=RUN,
    )
    vae: str | None = setting(None, "where the model's VAE is; default: as at packing", group="machine", role=RUN)
    vae_dtype: str = setting("fp32", "arithmetic of the decoder", group="machine", choices=PRECISIONS)
    vae_batch_size: int = setting(
        0, "latents decoded at once; 0: the whole batch", group="machine", role=RUN, at_least=0
    )
    vae_tiling: bool = setting(False, "decode in tiles: less memory at large sizes", group="machine")


def check(s: SampleConfig) -> None:
    """Raise UserError where settings contradict each other."""
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


def resolved(s: SampleConfig, *, null_class: bool = True) -> SampleConfig:
    """The settings with everything filled in that follows from others: the solver, the scales and intervals of guidance.

    Args:
        s: the settings as given.
        null_class: False if the model cannot be guided; a --cfg-scale that is left to the model (None) is then 1.
    """
    if s.cfg_scale is None and s.cls_cfg_scale is None and not null_class:
        s = replace(
            s, cfg_scale=1.0, guidance_low=0.0, guidance_high=1.0, cls_guidance_low=None, cls_guidance_high=None
        )
    scale = GUIDANCE_SCALE if s.cfg_scale is None else s.cfg_scale
    return replace(
        s,
        solver="heun" if s.heun else s.solver,
        cfg_scale=scale,
        cls_cfg_scale=scale if s.cls_cfg_scale is None else s.cls_cfg_scale or 1.0,
        cls_guidance_low=s.guidance_low if s.cls_guidance_low is None else s.cls_guidance_low,
        cls_guidance_high=s.guidance_high if s.cls_guidance_high is None else s.cls_guidance_high,
    )

"""Train SiT + REG (and, by flags, plain SiT, REPA, class token only) on a packed dataset.

    accelerate launch --num_processes 8 train.py --config recipes/reg-b2.yaml --data-dir data/imagenet256 --exp-name reg-b2

The same command again resumes from the newest checkpoint. See docs/training.md.
"""

from collections.abc import Sequence

from common.reporting import run, say
from config import parse
from training.settings import TrainConfig, check_values

EXAMPLES = (
    "python train.py --config recipes/reg-xl2.yaml --dry-run --assume imagenet256 --gpu RTX4090",
    "accelerate launch --num_processes 8 train.py --config recipes/reg-b2.yaml --data-dir data/in256 --exp-name reg-b2",
)


def train(settings: TrainConfig) -> int:
    """Train until max_train_steps or until a signal or --max-hours asks to stop; returns the exit status."""
    from training.setup import prepare

    with prepare(settings) as run:
        reason = run.watch(resumed=True)
        while run.step < settings.max_train_steps and reason is None:
            run.advance()
            reason = run.interrupt.requested()
            if run.due(settings.log_every) or run.due(settings.eval_every):
                run.log()
            if reason or run.due(settings.checkpointing_steps):
                run.save()
            reason = reason or run.watch()  # after the save: it may take longer than a scheduler waits
        if reason:
            run.save()  # if the stop was requested while watching
    return run.conclude(reason)


def main(argv: Sequence[str] | None = None) -> None:
    description = "Train a diffusion transformer with representation entanglement (REG)."
    settings = parse(TrainConfig, description, argv, examples=EXAMPLES)
    check_values(settings)
    if settings.dry_run:
        from training.dry_run import dry_run

        say(dry_run(settings))
        return
    status = train(settings)
    if status:
        from common.processes import leave

        leave()
        raise SystemExit(status)


if __name__ == "__main__":
    run(main, "use --micro-batch auto, a larger --gradient-accumulation-steps, or --gradient-checkpointing")

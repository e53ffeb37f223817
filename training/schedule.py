"""The learning rate as a function of the step."""

import math

from training.settings import TrainConfig


def learning_rate(settings: TrainConfig, step: int) -> float:
    """The learning rate of a step: linear warm-up, then constant (published), or a cosine that would reach 0 after the last
    step (Loshchilov & Hutter 2017, without restarts).

    Args:
        settings: of the run.
        step: counted from 0.
    """
    base, warmup = settings.learning_rate, settings.lr_warmup_steps
    if step < warmup:
        return base * (step + 1) / warmup
    if settings.lr_schedule == "constant":
        return base
    done = (step - warmup) / max(settings.max_train_steps - warmup, 1)
    return base / 2 * (1 + math.cos(math.pi * min(done, 1.0)))

"""The words of every choice that a user makes; settings and the modules that implement the choices import them from here."""

from collections.abc import Collection

from config import UserError


def check(what: str, value: str, known: Collection[str]) -> None:
    """Raise a UserError that names the words of a choice, unless `value` is one of them."""
    if value not in known:
        raise UserError(f"{what} {value!r} is none of {', '.join(known)}")


PATHS = ("linear", "cosine")  # of the interpolant
WEIGHTINGS = ("uniform", "lognormal")  # distributions of t in training
SCHEDULES = ("constant", "cosine")  # of the learning rate

DISTANCE_RULES = ("adm", "fp32")  # arithmetic of the distances of precision and recall

MODES = ("sde", "ode")
SOLVERS = {"sde": ("euler", "dpmpp"), "ode": ("euler", "heun", "dpmpp", "dopri5")}
GRIDS = ("uniform", "shifted")
DIFFUSIONS = ("linear", "sigma", "constant")  # coefficients w(t) of the reverse SDE
LAST_STEPS = ("drift", "ode")  # of Euler-Maruyama

DEVICES = ("auto", "cpu", "cuda")
PRECISIONS = ("fp32", "bf16", "fp16")  # of networks
EXPORTS = ("model", "diffusers")  # formats of a folder to be shared

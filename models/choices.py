"""The words of every choice that a user makes, once; settings and the modules that implement them import them from here."""

PATHS = ("linear", "cosine")  # of the interpolant
WEIGHTINGS = ("uniform", "lognormal")  # distributions of t in training

MODES = ("sde", "ode")
SOLVERS = {"sde": ("euler", "dpmpp"), "ode": ("euler", "heun", "dpmpp", "dopri5")}
GRIDS = ("uniform", "shifted")
DIFFUSIONS = ("linear", "sigma", "constant")  # coefficients w(t) of the reverse SDE
LAST_STEPS = ("drift", "ode")  # of Euler-Maruyama

DEVICES = ("auto", "cpu", "cuda")
PRECISIONS = ("fp32", "bf16", "fp16")  # of networks

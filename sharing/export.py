"""Write a trained model as a folder to hand on: a model file with its VAE and card, or a pipeline for diffusers.

python -m sharing.export --checkpoint runs/reg-b2 --out reg-b2
python -m sharing.export --checkpoint runs/reg-b2 --out reg-b2-diffusers --format diffusers
"""

from collections.abc import Sequence

from common.reporting import run, say
from config import UserError, parse
from sharing.settings import ExportConfig

EXAMPLES = (
    "python -m sharing.export --checkpoint runs/reg-b2 --out reg-b2 --dtype bf16 --licence mit",
    "python -m sharing.export --checkpoint runs/reg-b2 --out reg-b2-diffusers --format diffusers",
)


def main(argv: Sequence[str] | None = None) -> None:
    settings = parse(ExportConfig, "Write a trained model as a folder to hand on.", argv, examples=EXAMPLES)
    if settings.out.exists():
        raise UserError(f"--out {settings.out} exists already: give the name of a folder that is to be made")
    from sharing.folder import export

    say(export(settings))


if __name__ == "__main__":
    run(main)

"""Where the weights of a new run come from: --init-from, or the fresh initialisation."""

from dataclasses import dataclass
from pathlib import Path

from common.files import sha256
from common.reporting import say
from models import transfer
from models.model_file import ModelInfo, load_model, read_info, verify_model
from models.obtain import obtain
from models.sit import SiT
from models.transfer import Target
from training import checkpoints
from training.plan import Plan
from training.settings import TrainConfig


@dataclass(frozen=True)
class Source:
    """The model that a run starts from. path: of the model file. name: as given. sha256: of the file."""

    path: Path
    name: str
    info: ModelInfo
    sha256: str


def open_source(settings: TrainConfig, plan: Plan) -> Source | None:
    """The model of --init-from, compared with what the run trains. Weights are not loaded.

    None where none is given, and where the run has checkpoints: it goes on from those, and the model may be gone.

    Raises:
        UserError: it cannot be had, or means something else than the run's network.
    """
    folder = settings.output_dir / (settings.exp_name or "") / "checkpoints"
    if settings.init_from is None or checkpoints.by_step(folder):
        return None
    path = obtain(settings.init_from)
    source = Source(path, str(settings.init_from), read_info(path), verify_model(path) or sha256(path))
    for doubt in transfer.check(source.info, _target(plan), source.name):
        say(f"warning: {doubt}")
    return source


def take_weights(network: SiT, source: Source, plan: Plan) -> str:
    """Copy the weights that fit into the freshly initialised network; returns what was copied, in words."""
    model = load_model(source.path)
    said = transfer.transfer(model.network.state_dict(), source.info, network, _target(plan))
    return f"weights of {source.name} (SHA-256 {source.sha256[:16]}): {'; '.join(said)}"


def _target(plan: Plan) -> Target:
    manifest = plan.manifest
    return Target(
        network=plan.network,
        path=plan.objective.interpolant.path,
        classes=tuple(manifest.classes),
        vae=manifest.vae["name"],
        vae_weights=manifest.vae.get("weights", ""),
        factor=manifest.vae["factor"],
        normalization=plan.normalization,
        encoders=plan.encoders,
        encoder_weights=tuple(manifest.encoders[k].weights for k in plan.cached),
    )

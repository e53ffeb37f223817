"""The folders that sharing.export writes: whole or not at all."""

import json
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

from common.files import replacing
from common.lock import claim_file
from models.acceleration import DTYPES
from models.autoencoder import Autoencoder
from models.model_file import Model, load_model
from models.obtain import describe, obtain
from sampling.loading import load_decoder
from sharing.bundle import bundle
from sharing.card import model_card
from sharing.pretrained import PretrainedSiT
from sharing.reg_scheduler import REGScheduler
from sharing.reg_transformer import REGTransformer
from sharing.settings import ExportConfig

PARTS = {"transformer": "REGTransformer", "scheduler": "REGScheduler"}


def export(settings: ExportConfig) -> str:
    """Write the folder that the settings describe; returns what it is, in words.

    Raises:
        UserError: the model or its VAE cannot be had, a results file cannot be read, another program writes this folder,
            or the disk fails.
    """
    out = settings.out
    with closing(claim_file(out)):
        model = load_model(obtain(settings.checkpoint))
        pretrained = PretrainedSiT(model, load_decoder(model, settings.vae, "cpu") if settings.vae else None)
        with replacing(out) as temporary:
            temporary.mkdir()
            if settings.format == "diffusers":
                write_pipeline(temporary, model, pretrained.autoencoder, settings.dtype)
            else:
                pretrained.write(temporary, settings.dtype)
            (temporary / "README.md").write_text(model_card(temporary, model.info, settings), encoding="utf-8")
        return f"{out}: {describe(model.info)}; {settings.format} folder in {settings.dtype} with README.md"


def write_pipeline(out: Path, model: Model, autoencoder: Autoencoder, dtype: str) -> None:
    """Write the parts of a pipeline for diffusers into an empty folder.

    Projectors, which sampling does not use, are left out. The code of transformer, scheduler and pipeline is copied from
    this project by `bundle`.

    Args:
        out: the folder.
        model: to write.
        autoencoder: of its latents.
        dtype: precision of the stored weights; the VAE keeps its own.
    """
    shape = {
        name: value for name, value in asdict(model.info.network).items() if not name.startswith(("align", "proj"))
    }
    transformer = REGTransformer(**shape)
    weights = {name: x for name, x in model.network.state_dict().items() if not name.startswith("projectors.")}
    transformer.network.load_state_dict(weights)
    transformer.network.to(DTYPES[dtype])
    transformer.save_pretrained(out / "transformer")
    REGScheduler(path_type=model.info.path).save_pretrained(out / "scheduler")
    autoencoder.vae.register_to_config(_name_or_path="")  # diffusers keeps where it was read
    autoencoder.vae.save_pretrained(out / "vae")
    for part in PARTS:
        (out / part / f"reg_{part}.py").write_text(bundle(f"sharing.reg_{part}"), encoding="utf-8")
    (out / "pipeline.py").write_text(bundle("sharing.reg_pipeline"), encoding="utf-8")
    from diffusers import __version__

    index = {
        "_class_name": "REGPipeline",
        "_diffusers_version": __version__,
        **{part: [f"reg_{part}", name] for part, name in PARTS.items()},
        "vae": ["diffusers", "AutoencoderKL"],
        "id2label": {str(label): name for label, name in enumerate(model.info.classes)},
        "normalization": model.info.normalization,
    }
    (out / "model_index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")

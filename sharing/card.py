"""The model card of a folder to hand on: what it is, what was measured, how to sample from it, and its files' checksums."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.files import sha256
from evaluations.results import Results, as_markdown, load, table
from models.local_networks import portable
from models.model_file import ModelInfo
from models.obtain import describe
from sharing.settings import ExportConfig

_USE = {
    "model": """```python
from sharing.pretrained import PretrainedSiT  # in a clone of the project

model = PretrainedSiT.from_pretrained("{name}")
state = model.sample({labels}, num_steps=50, cfg_scale={scale})
pictures = model.autoencoder.decode(state.latent)  # uint8 (N, 3, {pixels}, {pixels})
```

or `python generate.py --checkpoint {name} --out samples --preset preview`.
""",
    "diffusers": """```python
from diffusers import DiffusionPipeline   # needs nothing else; or, inside this folder: from pipeline import REGPipeline

pipe = DiffusionPipeline.from_pretrained("{name}", custom_pipeline="pipeline", trust_remote_code=True)
pictures = pipe(class_labels={labels}, num_inference_steps=50, guidance_scale={scale}).images
```
""",
}


def model_card(folder: Path, info: ModelInfo, settings: ExportConfig) -> str:
    """The text of README.md.

    Args:
        folder: with the files to list.
        info: of the model.
        settings: title, results, sample files, data and licence.

    Raises:
        UserError: a results file cannot be read.
    """
    name, licence = settings.name or settings.out.name, settings.licence or info.notes.get("licence")
    results = [load(path) for path in settings.results]
    use = _USE[settings.format].format(
        name=name,
        labels=json.dumps(list(info.classes[:2]) or [0, 1], ensure_ascii=False),
        scale=2.3 if info.cfg_prob > 0 else 1.0,
        pixels=info.resolution,
    )
    start = info.notes.get("initialised_from")
    classes = (
        f" Classes: {', '.join(info.classes[:20])}{' ...' if len(info.classes) > 20 else ''}." if info.classes else ""
    )
    sections = [
        f"# {name}",
        f"A diffusion transformer with representation entanglement (REG, arXiv 2507.01467) or one of its ablations: "
        f"{describe(replace(info, vae=portable(info.vae)))}.{classes}",
        "## How to sample",
        use.rstrip(),
        "## Training",
        f"{info.step:,} optimiser steps, EMA weights. {settings.data or 'Data: not stated.'}"
        + (f" Started from the model with SHA-256 {start}." if start else ""),
    ]
    if results:
        sections += ["## Results", as_markdown(_rows(results)).rstrip()]
        sections += [f"Warnings of the measurement: {'; '.join(warnings)}" for r in results if (warnings := r.warnings)]
    sections += ["## Files", as_markdown(_files(folder, settings)).rstrip()]
    sections += ["## Licence", f"{licence or 'Not stated'} for the weights; code: MIT."]
    head = {"library_name": "diffusers" if settings.format == "diffusers" else "reg", "license": licence}
    tags = "\n".join(f"- {tag}" for tag in ("REG", "SiT", "class-conditional", "image-generation"))
    front = "\n".join(f"{key}: {value}" for key, value in head.items() if value)
    return f"---\n{front}\ntags:\n{tags}\n---\n\n" + "\n\n".join(sections) + "\n"


def _rows(results: list[Results]) -> list[list[str]]:
    """The table of evaluations.compare, with what else is needed to repeat a row."""
    head, *body = table(results)
    rows = [[*head, "NFE", "Labels", "Seed", "Reference", "SHA-256 of the samples"]]
    for cells, result in zip(body, results):
        sampling: dict[str, Any] = result.protocol.get("sampling", {})
        more = [str(sampling.get(key, "-")) for key in ("nfe", "labels", "seed")]
        digest = str(result.protocol.get("samples_sha256", "-"))
        rows.append([*cells, *more, str(result.protocol.get("reference") or "-"), digest])
    return rows


def _files(folder: Path, settings: ExportConfig) -> list[list[str]]:
    """Name, size and digest of all files of the folder, and of the sample files."""
    here = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "README.md")
    listed = [(path.relative_to(folder).as_posix(), path) for path in here]
    for given in settings.files:
        inside = sorted(path for path in given.rglob("*") if path.is_file()) if given.is_dir() else [given]
        listed += [(f"{given.name}/{path.name}" if given.is_dir() else path.name, path) for path in inside]
    return [["File", "Bytes", "SHA-256"], *([name, f"{path.stat().st_size:,}", sha256(path)] for name, path in listed)]

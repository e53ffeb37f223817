"""Run parts of the published code (a clone at 021ea2e) beside ours, without copying any of it.

Its modules are loaded from their files under names of their own, so that `models` and `loss` stay ours; its train.py and
generate.py import packages a bare GPU image lacks, so single functions are taken out of their source.
"""

import ast
import hashlib
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from config import MissingFile, UserError

if TYPE_CHECKING:
    from models.sit import SiTConfig

COMMIT = "021ea2e"
FILES = ("train.py", "loss.py", "samplers.py", "models/sit.py")
_SHA256 = "bef97bbac0e40caa579f3dc2876f9422cffe2c5559ea5f02984ecb9ea9ae2c08"  # of FILES at COMMIT, one after the other


def check(clone: Path) -> str:
    """The commit of the clone, for the record; it is known by its files, so that a copy without .git serves as well.

    Raises MissingFile if it is not a clone of the published code.
    """
    digest = hashlib.sha256()
    for file in FILES:
        if not (clone / file).is_file():
            raise MissingFile(f"--published {clone}: no {file}; give a clone of Martinser/REG at {COMMIT}")
        digest.update((clone / file).read_bytes())
    return COMMIT if digest.hexdigest() == _SHA256 else f"not {COMMIT}"


def module(clone: Path, file: str) -> ModuleType:
    """Load one file of the clone, such as "models/sit.py", as a module of its own."""
    name = "published_" + file.removesuffix(".py").replace("/", "_")
    spec = importlib.util.spec_from_file_location(name, clone / file)
    if spec is None or spec.loader is None:
        raise MissingFile(f"--published {clone}: {file} is not a Python file")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def network_arguments(config: "SiTConfig", *, fused: bool = True) -> dict[str, Any]:
    """What the SiT of the published code, or of REPA's, takes for a network of ours.

    fused: attention by scaled_dot_product_attention.
    """
    return {
        "input_size": config.input_size,
        "patch_size": config.patch_size,
        "hidden_size": config.hidden_size,
        "decoder_hidden_size": config.hidden_size,
        "depth": config.depth,
        "num_heads": config.num_heads,
        "encoder_depth": config.align_depth,
        "num_classes": config.num_classes,
        "z_dims": list(config.align_dims),
        "use_cfg": True,
        "fused_attn": fused,
        "qk_norm": False,
    }


def functions(clone: Path, file: str, names: Sequence[str], given: Mapping[str, Any]) -> dict[str, Any]:
    """Take the named top-level functions (or constants) out of a file without running the rest of it.

    given: the global names they use. Raises UserError if one is not there.
    """
    path = clone / file
    wanted = []
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        targets = [node.name] if isinstance(node, ast.FunctionDef) else []
        if isinstance(node, ast.Assign):
            targets = [target.id for target in node.targets if isinstance(target, ast.Name)]
        if set(targets) & set(names):
            wanted.append(node)
    scope = dict(given)
    exec(compile(ast.Module(wanted, type_ignores=[]), str(path), "exec"), scope)
    missing = [name for name in names if name not in scope]
    if missing:
        raise UserError(f"--published {clone}: {file} has no {missing[0]}; give a clone at {COMMIT}")
    return {name: scope[name] for name in names}

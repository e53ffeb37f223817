"""config.json of a run folder: the settings and the dataset that a run was started with."""

import json
from contextlib import suppress
from dataclasses import asdict
from itertools import zip_longest
from pathlib import Path
from typing import Any

from common.files import read_json, write_json
from common.reporting import say
from config import UserError, as_dict, differences, identity
from models.model_file import MODEL_FILE, read_info, read_state
from training.checkpoints import by_step
from training.settings import TrainConfig

CONFIG = "config.json"


def record_settings(folder: Path, settings: TrainConfig, facts: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """Compare the settings with those that the run was started with, then write config.json.

    Args:
        folder: of the run.
        settings: today's; those of role RUN may change freely, the others with --accept-changes.
        facts: what was derived: the network's config and the identity of the dataset.

    Returns:
        The accepted changes, in words, and the facts as they are recorded now: what the run
        was initialised from stays.

    Raises:
        UserError: settings differ; another network is never accepted.
    """
    path, recorded, facts = folder / CONFIG, as_dict(settings), json.loads(json.dumps(facts))
    free = recorded.keys() - identity(settings).keys()
    changes: list[str] = []
    former = _former(folder, facts)
    if former is not None:
        former_settings, former_facts = former
        other_network = former_facts["network"] != facts["network"]
        facts = {**{key: value for key, value in former_facts.items() if key == "initialised_from"}, **facts}
        changes = [
            _change(f"--{key.replace('_', '-')}", was, value)
            for key, was, value in differences(former_settings, recorded)
            if key not in free
        ]
        changes += [
            _change(key, former_facts.get(key), value)
            for key, value in facts.items()
            if former_facts.get(key) != value and key != "network"
        ]
        if other_network or (changes and not settings.accept_changes):
            ways = "choose another --exp-name"
            if not other_network:
                ways = f"repeat the former values, {ways}, or continue with the new ones by --accept-changes"
            listed = "; ".join(changes) or "the network"
            raise UserError(f"{folder} was started with other settings ({listed}): {ways}")
    write_json(path, {"settings": recorded, "facts": facts})
    return changes, facts


def _change(name: str, before: Any, now: Any) -> str:
    """What has changed, in words; of long lists, such as the names of all classes, the lengths and the first difference."""
    if isinstance(before, list) and isinstance(now, list) and len(before) + len(now) > 8:
        number, (was, value) = next((i, pair) for i, pair in enumerate(zip_longest(before, now)) if pair[0] != pair[1])
        return f"{name}: {len(before)} before, {len(now)} now; number {number}: {was} before, {value} now"
    return f"{name}: {before} before, {now} now"


def _former(folder: Path, facts: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Settings and facts that the run has had: by config.json, or where that is gone by its newest checkpoint.

    None before the first checkpoint: there is nothing to continue. Of the facts a checkpoint has only the model's, the
    others are taken to be those of today. Raises UserError where config.json is damaged.
    """
    path, checkpoints = folder / CONFIG, list(by_step(folder / "checkpoints").values())
    if checkpoints and path.is_file():
        try:
            former = read_json(path)
            return dict(former["settings"]), {"network": former["facts"]["network"], **former["facts"]}
        except (UserError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} is damaged ({error}); restore it or choose another --exp-name") from error
    for checkpoint in reversed(checkpoints):
        with suppress(UserError):
            settings, info = read_state(checkpoint).settings, read_info(checkpoint / MODEL_FILE)
            say(f"{path} is missing: the settings are compared with those of {checkpoint}")
            model = {"network": asdict(info.network), "classes": info.classes}
            return settings, facts | json.loads(json.dumps(model))
    return None

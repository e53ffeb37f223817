"""What each level is made of: images, networks and packed datasets, by the programs that write them."""

import json
from dataclasses import dataclass
from pathlib import Path

from quickstart.stages import Runner, Stage
from study.plan import NO_TEACHER, TOKENS, Spec

TEACHERS = ("supervised", "self-supervised", "random")


@dataclass(frozen=True)
class Level:
    """The folder of one level's images and networks; `prepare` makes what is missing of them."""

    out: Path

    @property
    def images(self) -> Path:
        """Class-folder trees train and test, and train.npz and test.npz."""
        return self.out / "images"

    @property
    def spaces(self) -> tuple[str, ...]:
        """Feature spaces of the judges, as evaluate.py --features takes them; the first one also names classes."""
        return tuple(f"timm:{self.out / 'networks' / name}" for name in ("judge", "efficientnet-lite2"))

    def network(self, name: str) -> Path:
        """Folder of a network."""
        return self.out / "networks" / name

    def dataset(self, spec: Spec) -> Path:
        """Packed dataset of a run; a row without a teacher reads no tokens, and takes any."""
        teacher = TEACHERS[0] if spec.teacher == NO_TEACHER else spec.teacher
        return self.out / "packed" / f"{spec.data}-{teacher}"

    def accuracy(self, teacher: str) -> dict[str, float]:
        """What a linear head of a teacher's class token names right of the held-out images."""
        return json.loads((self.network(teacher) / "accuracy.json").read_text(encoding="utf-8"))

    def prepare(self, spec: Spec, runner: Runner) -> None:
        """Run the stages that a run needs, unless they are finished."""
        for stage in self._stages(spec):
            if stage.name not in runner.records:
                runner.run(stage)

    def _stages(self, spec: Spec) -> list[Stage]:
        images, network = str(self.images), self.network
        stages = [Stage("images", ("python", "-m", "quickstart.digits", images), (self.images / "test.npz",))]

        def trained(name: str, *command: str) -> None:
            done = network(name) / "figures.json"
            stages.append(Stage(name, ("python", "-m", *command, str(network(name))), (done,), ("images",)))

        teacher = TEACHERS[0] if spec.teacher == NO_TEACHER else spec.teacher
        for name in ("vae", "judge"):
            trained(name, "quickstart.toy_networks", name, str(self.images / "train"))
        trained("efficientnet-lite2", "study.teachers", "efficientnet-lite2", images)
        if teacher == "supervised":
            trained(teacher, "quickstart.toy_networks", "encoder", str(self.images / "train"))
        else:
            trained(teacher, "study.teachers", teacher, images)
        accuracy = ("python", "-m", "study.teachers", "accuracy", images, str(network(teacher)))
        stages.append(Stage(f"accuracy-{teacher}", accuracy, (network(teacher) / "accuracy.json",), (teacher,)))
        packed = self.out / "packed" / f"labelled-{teacher}"
        source = ("--source", str(self.images / "train"), "--out", str(packed), "--resolution", "16")
        networks = ("--vae", str(network("vae")), "--enc-type", str(network(teacher)))
        pack = ("python", "preprocessing/pack.py", *source, *networks)
        stages.append(Stage(packed.name, pack, (packed / "dataset.json",), ("images", "vae", teacher)))
        if spec.data != "labelled":
            data, _, token = spec.data.partition(":")
            flags = (*(("--one-class",) if data == "unlabelled" else ()), *(TOKENS[token] if token else ()))
            derived = packed.with_name(f"{spec.data}-{teacher}")
            derive = ("python", "-m", "study.derive", str(packed), str(derived), *flags)
            stages.append(Stage(derived.name, derive, (derived / "dataset.json",), (packed.name,)))
        return stages

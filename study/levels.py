"""What each level is made of: images, networks and packed datasets, by the programs that write them."""

from dataclasses import dataclass
from pathlib import Path

from common.files import read_json
from config import UserError
from quickstart.stages import Runner, Stage
from study.plan import NO_TEACHER, TOKENS, Spec
from study.settings import StudyConfig

SUPERVISED = "supervised"


@dataclass(frozen=True)
class Level:
    """The folder of one level's images and networks; `prepare` makes what is missing of them.

    With --packed all of it is the user's: dataset, images to judge against, feature spaces.
    """

    out: Path
    settings: StudyConfig

    @property
    def train_images(self) -> Path:
        """Images that samples are judged against."""
        return self.settings.train_images or self.out / "images" / "train.npz"

    @property
    def held_out(self) -> Path:
        """Images of the same kind that nothing was trained on."""
        return self.settings.held_out or self.out / "images" / "test.npz"

    @property
    def spaces(self) -> tuple[str, ...]:
        """Feature spaces of the judges, as evaluate.py --features takes them; the first one may also name classes."""
        own = tuple(f"timm:{self.network(name)}" for name in ("judge", "efficientnet-lite2"))
        return self.settings.spaces or own

    def network(self, name: str) -> Path:
        """Folder of a network."""
        return self.out / "networks" / name

    def dataset(self, spec: Spec) -> Path:
        """Packed dataset of a run; a row without a teacher reads no tokens, and takes any."""
        teacher = SUPERVISED if spec.teacher == NO_TEACHER else spec.teacher
        return self.settings.packed or self.out / "packed" / f"{spec.data}-{teacher}"

    def accuracy(self, teacher: str) -> dict[str, float]:
        """What a linear head of a teacher's class token names right of the held-out images."""
        return read_json(self.network(teacher) / "accuracy.json")

    def prepare(self, spec: Spec, runner: Runner) -> None:
        """Run the stages that a run needs, unless they are finished.

        Raises:
            UserError: --packed is given without images or spaces, or needed and not given.
        """
        if self.settings.packed:
            if not (self.settings.train_images and self.settings.held_out and self.settings.spaces):
                raise UserError("--packed needs --train-images, --held-out and --spaces: what samples are judged by")
            if spec.data != "labelled":
                raise UserError(f"{spec.name}: derive that dataset by `python -m study.derive` and give it as --packed")
            return
        if self.settings.level == "imagenet":
            raise UserError("--packed is required: ImageNet as packed by preprocessing/pack.py")
        for stage in self._stages(spec):
            if stage.name not in runner.records:
                runner.run(stage)

    def _stages(self, spec: Spec) -> list[Stage]:
        settings, network = self.settings, self.network
        images = self.out / "images"
        if settings.level == "digits":
            write: tuple[str, ...] = ("quickstart.digits", str(images))
        else:
            source = flags(("--source", settings.source, None), ("--per-class", settings.per_class, None))
            write = ("study.images", settings.level, str(images), "--resolution", str(settings.resolution), *source)
        stages = [Stage("images", ("python", "-m", *write), (images / "test.npz",))]

        def trained(name: str, *command: str) -> None:
            done = network(name) / "figures.json"
            stages.append(Stage(name, ("python", "-m", *command), (done,), ("images",)))

        def toy(kind: str, name: str, *flags: str) -> None:
            trained(name, "quickstart.toy_networks", kind, str(images / "train"), str(network(name)), *flags)

        teacher = SUPERVISED if spec.teacher == NO_TEACHER else spec.teacher
        grid = flags(("--grid", settings.grid, 4))
        toy("vae", "vae", *flags(("--steps", settings.vae_steps, 400), ("--width", settings.vae_width, 16)), *grid)
        toy("judge", "judge")
        for name in ("efficientnet-lite2", *(() if teacher == SUPERVISED else (teacher,))):
            trained(name, "study.teachers", name, str(images), str(network(name)), *grid)
        if teacher == SUPERVISED or teacher.startswith("efficientnet-lite"):
            toy("encoder", SUPERVISED, *flags(("--steps", settings.encoder_steps, 600)), *grid)
        accuracy = ("python", "-m", "study.teachers", "accuracy", str(images), str(network(teacher)), *grid)
        stages.append(Stage(f"accuracy-{teacher}", accuracy, (network(teacher) / "accuracy.json",), (teacher,)))
        lite = teacher.startswith("efficientnet-lite")  # packed with the pixels, and with another encoder's tokens
        packed = self.out / "packed" / ("pixels" if lite else f"labelled-{teacher}")
        into = ("--source", str(images / "train"), "--out", str(packed), "--resolution", str(settings.resolution))
        mirrored = ("--flip",) * settings.flip
        reader, pixels = (SUPERVISED, ("--pixels",)) if lite else (teacher, ())
        networks = ("--vae", str(network("vae")), "--enc-type", str(network(reader)), *pixels)
        pack = ("python", "preprocessing/pack.py", *into, *mirrored, *networks)
        stages.append(Stage(packed.name, pack, (packed / "dataset.json",), ("images", "vae", reader)))
        if lite:
            own, encoder = packed.with_name(f"labelled-{teacher}"), ("--encoder", str(network(teacher)))
            read = ("python", "-m", "study.derive", str(packed), str(own), *encoder)
            stages.append(Stage(own.name, read, (own / "dataset.json",), (packed.name, teacher)))
            packed = own
        if spec.data != "labelled":
            data, _, token = spec.data.partition(":")
            changes = (*(("--one-class",) if data == "unlabelled" else ()), *(TOKENS[token] if token else ()))
            derived = packed.with_name(f"{spec.data}-{teacher}")
            derive = ("python", "-m", "study.derive", str(packed), str(derived), *changes)
            stages.append(Stage(derived.name, derive, (derived / "dataset.json",), (packed.name,)))
        return stages


def flags(*settings: tuple[str, object, object]) -> tuple[str, ...]:
    """The words of (flag, value, default) on a command line, where they say anything: a stage's command is its identity."""
    return tuple(word for flag, value, default in settings if value != default for word in (flag, str(value)))

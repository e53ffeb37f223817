"""The runs of a level: data, teacher, row of the paper's ablation, seed. No torch here."""

from collections.abc import Iterator
from dataclasses import dataclass

from config import UserError
from study.settings import StudyConfig

ROWS: dict[str, tuple[str, ...]] = {  # rows of the paper's ablation => flags of train.py
    "sit": ("--no-class-token", "--proj-coeff", "0"),
    "token": ("--proj-coeff", "0"),  # the class token is denoised, nothing is aligned
    "repa": ("--no-class-token",),
    "token-patch": ("--no-align-class-token",),  # the class token is denoised, the patch tokens alone are aligned
    "reg": (),
}
TITLES = {
    "sit": "SiT",
    "token": "SiT + class token",
    "repa": "SiT + REPA",
    "token-patch": "SiT + class token + REPA",
    "reg": "SiT + REG",
}
IN_WORDS = {"unlabelled": "without labels", "labelled": "with labels"}
DATA = ("labelled", "unlabelled")  # unlabelled: all images are of one class
TOKENS = {  # class tokens of a data word such as unlabelled:token-mean => flags of study.derive
    "token-mean": ("--token", "mean"),
    "token-empty": ("--token", "empty"),
    "token-x0.5": ("--scale", "0.5"),
    "token-x2": ("--scale", "2"),
    "token-rms": ("--scale", "0"),
}
TOKENS_IN_WORDS = {
    "token-mean": "mean of the patch tokens as class token",
    "token-empty": "class token without content",
    "token-x0.5": "class token x 0.5",
    "token-x2": "class token x 2",
    "token-rms": "class token of unit RMS",
}
RAW, EMA = "raw", "ema"  # the weights that are judged; raw ones at the last step alone
SIBLING = "efficientnet-lite0"  # of EfficientNet-Lite2, a judge: as a teacher it is marked
NO_TEACHER = "none"  # the word of a row that reads no token of any encoder


@dataclass(frozen=True)
class Spec:
    """One run.

    Attributes:
        data: a word of DATA, and after a colon one of TOKENS.
        teacher: the encoder whose tokens are read.
        row: a word of ROWS, and changed flags after it: `reg+class-coeff=0.1`.
        seed: of weights, data order and noise.
        guided: whether the samples of the recipe's guidance settings are judged, in the place of unguided ones.
    """

    data: str
    teacher: str
    row: str
    seed: int
    guided: bool = False

    @property
    def labelled(self) -> bool:
        """Whether the classes are known."""
        return self.data.split(":")[0] == "labelled"

    @property
    def name(self) -> str:
        return f"{self.data}-{self.teacher}-{self.row}-seed{self.seed}"

    @property
    def flags(self) -> tuple[str, ...]:
        """Those of train.py."""
        base, *changes = self.row.split("+")
        changed = [word for change in changes for word in ("--" + change).split("=")]
        return (*ROWS[base], *changed, "--seed", str(self.seed))


def runs(settings: StudyConfig) -> list[Spec]:
    """All runs of a level in their order, each once; rows without a teacher do not depend on which one is named.

    Raises:
        UserError: a line of `runs` cannot be read.
    """
    return list(dict.fromkeys(spec for line in settings.runs for spec in _read(line)))


def row_title(row: str) -> str:
    """A row in words, with its changed flags: `SiT + REG, --class-coeff 0.1`."""
    base, *changes = row.split("+")
    return ", ".join([TITLES[base], *(f"--{change.replace('=', ' ')}" for change in changes)])


def data_title(data: str) -> str:
    """A data word in words: `without labels, class token x 2`."""
    base, _, token = data.partition(":")
    return ", ".join([IN_WORDS[base], *([TOKENS_IN_WORDS[token]] if token else [])])


def teacher_title(teacher: str) -> str:
    """A teacher's name, marked if its sibling is a judge."""
    return f"{teacher}\u2020" if teacher == SIBLING else teacher


def judgements(spec: Spec, settings: StudyConfig) -> list[tuple[int, str]]:
    """(step, weights) of what a run is judged by, the weights with the words of the guidance."""
    last = settings.steps[-1]
    if spec.guided:
        return [(last, f"{EMA} guided {words}") for words in settings.guidance]
    return [*((step, EMA) for step in settings.steps), (last, RAW)]


def _read(line: str) -> Iterator[Spec]:
    words, guided = line.removesuffix(" guided").split(), line.endswith(" guided")
    base, _, token = words[0].partition(":")
    good = len(words) == 4 and base in DATA and (not token or token in TOKENS)
    if not good or not all(seed.isdigit() for seed in words[3].split(",")):
        raise UserError(
            f"runs: {line!r} must be 'DATA TEACHER ROW[,ROW...] SEED[,SEED...] [guided]', DATA one of {', '.join(DATA)} and "
            f"after a colon one of {', '.join(TOKENS)}"
        )
    data, teacher, rows, seeds = words
    for seed in map(int, seeds.split(",")):
        for row in rows.split(","):
            if row.split("+")[0] not in ROWS:
                raise UserError(f"runs: {line!r}: {row!r} is not a row of the ablation ({', '.join(ROWS)})")
            yield Spec(data, NO_TEACHER if row.split("+")[0] == "sit" else teacher, row, seed, guided)

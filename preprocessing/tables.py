"""Hugging Face image datasets in a local folder: parquet files, or the arrow files of `save_to_disk`. Needs pyarrow."""

from pathlib import Path
from typing import Any

from common.class_names import split_kinds
from common.contents import Item, is_hidden
from common.files import parse_json, read_json
from config import UserError
from preprocessing.index import Listing

IMAGE_COLUMNS = ("image", "img", "jpg", "png")
KINDS = (".parquet", ".arrow")
LABEL_COLUMNS = ("label", "labels", "fine_label", "cls")


def is_table(source: Path) -> bool:
    """Whether this is a parquet or arrow file, a folder with such files in it or in its data/, or FOLDER/SPLIT."""
    return bool(_table_files(source)) if not source.is_file() else source.suffix in KINDS


def list_tables(source: Path) -> Listing:
    """Rows of all files, in the order of the files' names. Raises UserError where there is no image or label column."""
    root = source if source.is_dir() else source.parent
    files = [source.name] if source.is_file() else _table_files(source)
    splits = {_split(file) for file in files}
    if len(splits) > 1 and (len(split_kinds(splits)) > 1 or splits & {"train", "training"}):
        found = ", ".join(sorted(splits))
        raise UserError(
            f"--source {source}: holds the splits {found}; give one of them, such as "
            f"{root / Path(files[0]).parent / min(splits, key=lambda name: 'train' not in name)}"
        )
    items: list[Item] = []
    names: list[str] | None = None
    for number, file in enumerate(files):
        table = Table(root / file)
        if names and table.class_names and names != table.class_names:
            raise UserError(f"{root / file}: its classes are not those of {files[0]}; move it to a folder of its own")
        names = names or table.class_names
        row = 0
        for group in range(table.groups):
            labels = table.labels(group)
            if None in labels or any(not isinstance(label, int) for label in labels):
                raise UserError(f"{root / file}: column {table.label!r} must hold class numbers, found {labels[:1]}")
            for within, label in enumerate(labels):
                items.append(Item(f"{file}#{row}", label, number, group, within))
                row += 1
    kind = "parquet" if files[0].endswith(".parquet") else "arrow"
    return Listing(kind, root, files, items, names, path=source)


class Table:
    """One file, read a group of rows at a time: a row group of parquet, a record batch of arrow."""

    def __init__(self, path: Path) -> None:
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError as error:
            raise UserError(f"{path}: reading it needs pyarrow; install it with `pip install pyarrow`") from error
        self._batches: list[Any] | None = None
        try:
            if path.suffix == ".parquet":
                self._parquet = pyarrow.parquet.ParquetFile(path)
                schema, self.groups = self._parquet.schema_arrow, self._parquet.num_row_groups
            else:
                table = _open_arrow(pyarrow, path)
                self._batches = table.to_batches()
                schema, self.groups = table.schema, len(self._batches)
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise UserError(f"{path}: damaged ({str(error).splitlines()[0]})") from error
        self.image = _column(path, schema.names, IMAGE_COLUMNS)
        self.label = _column(path, schema.names, LABEL_COLUMNS)
        self.class_names = _class_names(schema, self.label, path.parent)
        self._cached: tuple[int, Any] | None = None

    def labels(self, group: int) -> list[Any]:
        """Class numbers of one group of rows."""
        return self._read(group, self.label).to_pylist()

    def image_bytes(self, group: int, row: int) -> bytes:
        """The encoded image of one row; the group is kept, since the next row is most often its neighbour."""
        if self._cached is None or self._cached[0] != group:
            self._cached = (group, self._read(group, self.image))
        value = self._cached[1][row].as_py()
        return value["bytes"] if isinstance(value, dict) else value

    def _read(self, group: int, column: str) -> Any:
        if self._batches is not None:
            return self._batches[group].column(column)
        return self._parquet.read_row_group(group, columns=[column]).column(column).combine_chunks()


def _open_arrow(pyarrow: Any, path: Path) -> Any:
    memory = pyarrow.memory_map(str(path))
    try:
        return pyarrow.ipc.open_stream(memory).read_all()  # what `datasets` writes
    except pyarrow.ArrowInvalid:
        return pyarrow.ipc.open_file(pyarrow.memory_map(str(path))).read_all()


def _split(file: str) -> str:
    """train-00000-of-00002.parquet => train."""
    return Path(file).stem.split("-")[0]


def _table_files(folder: Path) -> list[str]:
    """The tables of a folder; of a folder and the name of a split in it, those of the split, relative to the folder."""
    if not folder.exists() and folder.parent.is_dir():
        return [file for file in _table_files(folder.parent) if "/" not in file and _split(file) == folder.name]
    for below in ("", "data"):
        for suffix in KINDS:
            names = sorted(p.name for p in (folder / below).glob(f"*{suffix}") if not is_hidden(p.name))
            found = [f"{below}/{name}".removeprefix("/") for name in names]
            if found:
                return found
    return []


def _column(path: Path, present: list[str], wanted: tuple[str, ...]) -> str:
    found = [name for name in wanted if name in present]
    if not found:
        raise UserError(f"{path}: no column {' or '.join(wanted)}, only {', '.join(present)}")
    return found[0]


def _class_names(schema: Any, label: str, folder: Path) -> list[str] | None:
    """Names of the classes: in the schema's metadata, or in dataset_info.json beside the file."""
    metadata = (schema.metadata or {}).get(b"huggingface")
    beside = folder / "dataset_info.json"
    try:
        if metadata:
            features = parse_json(metadata, str(folder))["info"]["features"]
        else:
            features = read_json(beside)["features"]
        return list(features[label]["names"])
    except (UserError, KeyError, TypeError):
        return None  # no names: the classes are called by their numbers

"""What can be packed: a folder of class folders, the published layout, zip, tar, parquet and arrow => an Index."""

from pathlib import Path

from common.contents import LABELS, OTHERS, Contents, Item
from common.labels import announced_labels, read_labels
from common.listing import list_contents
from common.reporting import say
from config import UserError
from preprocessing import tables
from preprocessing.index import Index, Listing, build
from preprocessing.settings import PackConfig

IMAGE_FOLDERS = ("imagenet_256_vae", "images")  # of the published layout: REG's, REPA's
LATENT_FOLDER = "vae-sd"


def list_images(settings: PackConfig) -> Index:
    """The images of --source and their classes, as the settings want them. Raises UserError as `list_source`."""
    skip = settings.on_corrupt == "skip"
    return list_source(settings.images, settings.classes, settings.allow_one_class, skip_unreadable=skip)


def list_source(
    source: Path, classes: Path | None = None, allow_one_class: bool = False, *, skip_unreadable: bool = False
) -> Index:
    """Find the images of a source and their classes.

    Args:
        source: what --source names.
        classes: text file of the classes to take; None: all.
        allow_one_class: accept images that are all of one class.
        skip_unreadable: list also images that cannot be read for a known reason: packing leaves them out.

    Raises:
        UserError: names what is wrong.
    """
    if (source / LATENT_FOLDER / LABELS).is_file():
        listing = _list_published(source)
    elif tables.is_table(source):
        listing = tables.list_tables(source)
    else:
        try:
            contents = list_contents(source)
        except UserError as error:
            raise type(error)(f"--source {error}") from error
        listing = _labelled(contents, source)
        if contents.unreadable and not skip_unreadable:
            raise UserError(
                f"--source {source}: {contents.refusal()}; --on-corrupt skip leaves such images out and lists them"
            )
        if contents.left_out:
            say(f"left out of {source}: {contents.note()}")
    return build(listing, classes, allow_one_class)


def _labelled(contents: Contents, source: Path) -> Listing:
    """With labels from a `dataset.json` of EDM's kind, {"labels": [[name, number], ...]}, where there is one."""
    items, labels = contents.items, announced_labels(contents)
    if labels is not None and labels.numbers is not None:
        items = [item._replace(label=number) for item, number in zip(items, labels.numbers)]
    return Listing(
        contents.kind,
        contents.root,
        contents.files,
        items,
        ignored=contents.ignored,
        path=source,
        folders=contents.folders,
        unlabelled=labels.where if labels is not None and labels.numbers is None else "",
    )


# -------------------------------------------------------------------------------------------------- published layout


def _list_published(root: Path) -> Listing:
    """Crops as PNG and moments as npy, as the published preprocessing leaves them; pairs are matched by name."""
    images = next((name for name in IMAGE_FOLDERS if (root / name).is_dir()), None)
    if images is None:
        wanted = " nor ".join(f"{name}/" for name in IMAGE_FOLDERS)
        raise UserError(f"--source {root}: has {LATENT_FOLDER}/ but neither {wanted}")
    contents, beside_them = list_contents(root / images), list_contents(root / LATENT_FOLDER)
    crops = sorted(item.name for item in contents.items)
    latents = sorted(name for name in beside_them.left_out[OTHERS] if name.endswith(".npy"))
    labels = _read_published_labels(beside_them)
    unpaired = {latent_name(crop): crop for crop in crops}
    unpaired = {name: unpaired.get(name, name) for name in unpaired.keys() ^ set(latents)}
    if unpaired:
        name = unpaired[min(unpaired)]
        has, lacks = (LATENT_FOLDER, images) if name.endswith(".npy") else (images, LATENT_FOLDER)
        raise UserError(
            f"--source {root}: {name} of {has}/ has no partner in {lacks}/; the two folders do not belong together"
        )
    crop_labels = _read_published_labels(contents) if "" in contents.labels else {}
    items = []
    for crop in crops:
        latent = latent_name(crop)
        if latent not in labels:
            raise UserError(f"{root / LATENT_FOLDER / 'dataset.json'}: has no label for {latent}")
        if crop_labels.get(crop, labels[latent]) != labels[latent]:
            raise UserError(
                f"--source {root}: {crop} has label {crop_labels[crop]} and {latent} has {labels[latent]}; the two folders "
                "do not belong together"
            )
        items.append(Item(crop, labels[latent]))
    return Listing("published", root, [images], items, path=root)


def latent_name(crop: str) -> str:
    """Published naming: 00000/img00000000.png => 00000/img-mean-std-00000000.npy."""
    folder, _, file = crop.rpartition("/")
    stem = file.rpartition(".")[0]
    return f"{folder}/img-mean-std-{stem.removeprefix('img')}.npy".removeprefix("/")


def _read_published_labels(contents: Contents) -> dict[str, int]:
    labels = read_labels(contents.labels[""](), where := str(contents.root / LABELS))
    if labels is None:
        raise UserError(f"{where}: holds no labels; the published preprocessing had lost them")
    return labels

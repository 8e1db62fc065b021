"""What the folders under a root are: training and held-out part, or classes. Folders with two readings are refused."""

import os
import re
import unicodedata
from typing import NamedTuple, NoReturn

from ..config import UserError
from ..messages.text import listed, printable
from .listing import STRAY, Listing
from .parts import PART_NAMES, TEST_NAMES, part_of

FEW = 0.1
"""Largest share of the images under a folder with subfolders that may lie directly in it; they are left out."""
OTHERS = 2
"""Largest number of other folders beside folders with names like parts that makes these doubtful as classes."""
IMAGE_FOLDERS = frozenset(("image", "images", "img", "imgs", "jpegimages", "jpg", "jpeg", "png"))
"""Lower-case names that no class has: such a folder has masks, annotations or the like beside it."""
ANNOTATIONS = frozenset(
    ("annotation", "annotations", "groundtruth", "ground_truth", "labels", "masks", "segmentation", "segmentations")
)
"""Lower-case names of folders that hold no images to train on, where they stand beside one or two other folders."""
_NAMES = "|".join(name for names in PART_NAMES.values() for name in names)
LIKE_A_PART = re.compile(rf"^(?i:{_NAMES}|trainval)(?i:set)?(?![a-z])|(?<![A-Za-z])(?i:{_NAMES})$")
"""Names such as train2017, training_set, trainA and seg_train, which are no names of parts but may be meant so."""


class Part(NamedTuple):
    """Images of one part: directories by class name; without class folders, one directory under the name ""."""

    name: str
    """Name of the part's folder; "" where the folder is not divided into parts."""
    classes: dict[str, list[str]]


class Layout(NamedTuple):
    """The part or parts, training images first, in the folder `base`; `others` are folders beside the parts."""

    base: str
    parts: tuple[Part, ...]
    others: dict[str, int]
    """Number of images in each folder that is left out, by its name."""


def understand(listing: Listing) -> Layout:
    """Parts and classes under the root of a listing. Raises: UserError where two readings are plausible."""
    base = listing.root
    while not (names := parts_in(listing, base)) and (inner := inner_folder(listing, base)):
        leave_out_strays(listing, base)
        base = inner
    if not names:
        return Layout(base, (Part("", classes_in(listing, base)),), {})
    refuse_repeats_between(listing, base, names)
    folders = listing.subfolders(base)
    for name in names:
        if not folders[name]:
            refuse(base, f"no images in {printable(name)}/ or its subfolders; fill it, or move it away")
    leave_out_strays(listing, base)
    bases = [os.path.join(base, name) for name in names]
    while all(inner := [inner_folder(listing, part) for part in bases]):  # in both alike, or class names would differ
        for part in bases:
            leave_out_strays(listing, part)
        bases = inner
    bases = without_repeated_names(listing, bases)
    train, test = (Part(name, classes_in(listing, part)) for name, part in zip(names, bases, strict=True))
    refuse_different_classes(base, train, test)
    others = {name: found for name, found in folders.items() if found and name not in names}
    refuse_classes_beside_parts(base, names, others)
    return Layout(base, (train, test), {name: listing.count(found) for name, found in others.items()})


def inner_folder(listing: Listing, base: str) -> str:
    """The folder in `base` that alone holds folders of images, as archives unpack to pets/pets/; "" without one."""
    full = {name: found for name, found in listing.subfolders(base).items() if found}
    if len(full) != 1:
        return ""
    [(name, directories)] = full.items()
    inner = os.path.join(base, name)
    return "" if inner in directories else inner


def without_repeated_names(listing: Listing, parts: list[str]) -> list[str]:
    """Folders with the images of two parts: train/train/ and test/test/, where each is alone in its part, else `parts`.

    As classes, two folders of different names would have nothing in common.
    """
    full = [[name for name, found in listing.subfolders(part).items() if found] for part in parts]
    if any(len(names) != 1 for names in full) or full[0] == full[1]:
        return parts
    for part in parts:
        leave_out_strays(listing, part)
    return [os.path.join(part, names[0]) for part, names in zip(parts, full, strict=True)]


def parts_in(listing: Listing, base: str) -> tuple[str, str] | None:
    """Names of the folders of training and held-out images in `base`; None where it is one undivided set.

    Raises: UserError where a name may or may not mean a part.
    """
    refuse_lost_part(listing, base)
    folders = listing.subfolders(base)
    named = {part: [name for name in folders if part_of(name) == part] for part in PART_NAMES}
    held_out = next((named[part] for part in TEST_NAMES if named[part]), [])
    if named["train"] and held_out:
        for names in (named["train"], held_out):
            if len(names) > 1:
                refuse(base, f"{folders_of(names)} may each be meant; keep one of them")
        return named["train"][0], held_out[0]
    full = [name for name, found in folders.items() if found]
    if held_out := [name for part in TEST_NAMES for name in full if part_of(name) == part]:
        refuse(
            base,
            f"{folders_of(held_out)} without train/; put the training images into train/, give --data.root "
            f"{os.path.join(base, held_out[0])} to train on those, or give a class of that name another name",
        )
    refuse_train_among_folders(base, {name: folders[name] for name in full})
    refuse_names_like_parts(base, full)
    return None


def refuse_classes_beside_parts(base: str, parts: tuple[str, str], others: dict[str, list[str]]) -> None:
    """Refuse parts beside several folders that look like classes, with images and without subfolders of images."""
    classes = [name for name, found in others.items() if found == [os.path.join(base, name)] and not part_of(name)]
    if len(classes) > 1:
        where = f"{folders_of(classes)} with images beside {folders_of([*parts])}"
        refuse(base, f"{where}; put classes into these parts, or move the others away")


def refuse_train_among_folders(base: str, folders: dict[str, list[str]]) -> None:
    """Refuse train/ beside other folders without val/. A class of trains is a folder like at least two others."""
    train = [name for name in folders if part_of(name) == "train"]
    others = [name for name in folders if name not in train]
    a_class = len(others) > 1 and all(folders[name] == [os.path.join(base, name)] for name in train)
    if train and others and not a_class:
        refuse(
            base,
            f"{folders_of(train)} beside {folders_of(others)} and no val/; give --data.root "
            f"{os.path.join(base, train[0])} to use it alone, or move the others away",
        )


def refuse_names_like_parts(base: str, folders: list[str]) -> None:
    """Refuse a few folders of which some have names such as train2017 and val2017, which would be read as classes."""
    like = [name for name in folders if LIKE_A_PART.search(name)]
    kinds = {"train" in name.lower() for name in like}
    if len(kinds) == 2 and len(folders) <= len(like) + OTHERS:
        refuse(base, f"{folders_of(like)} would be classes; if they are parts, name or link them train/ and val/")


def classes_in(listing: Listing, base: str) -> dict[str, list[str]]:
    """Directories of images by class name, sorted, where `base` has class folders; else {"": [base]}.

    Names are in Unicode's composed form, so that an accent is the same from every system.
    """
    folders = {name: found for name, found in listing.subfolders(base).items() if found}
    if not folders:
        return {"": [base]}
    leave_out_strays(listing, base)
    refuse_annotations(base, [*folders])
    classes: dict[str, list[str]] = {}
    for name, directories in folders.items():
        prefix = os.path.join(base, name, "")
        inner = {directory[len(prefix) :].partition(os.sep)[0] for directory in directories} - {""}
        refuse_within(base, name, inner, folders)
        classes.setdefault(unicodedata.normalize("NFC", name), []).extend(directories)
    return dict(sorted(classes.items()))


def refuse_annotations(base: str, folders: list[str]) -> None:
    """Refuse a folder of images or of annotations beside other folders: they would be classes."""
    if len(folders) < 2:
        return
    if images := [name for name in folders if name.lower() in IMAGE_FOLDERS]:
        others = [name for name in folders if name != images[0]]
        alone = f"give --data.root {os.path.join(base, images[0])} to use it alone"
        refuse(base, f"{folders_of(images[:1])} beside {folders_of(others)} would be classes; {alone}")
    out = [name for name in folders if name.lower() in ANNOTATIONS]
    if out and len(folders) <= len(out) + OTHERS:
        others = [name for name in folders if name not in out]
        refuse(base, f"{folders_of(out)} beside {folders_of(others)} would be classes; move annotations away")


def refuse_within(base: str, name: str, inner: set[str], classes: dict[str, list[str]]) -> None:
    """Refuse a class `name` whose inner folders are parts, images beside masks, or copies of the other classes."""
    alone = f"give --data.root {os.path.join(base, name)} if this is the set"
    parts = {part_of(folder) for folder in inner}
    if "train" in parts and parts & set(TEST_NAMES):
        refuse(base, f"{printable(name)}/ holds parts; put classes into parts, as train/{printable(name)}/, or {alone}")
    images = [folder for folder in sorted(inner) if folder.lower() in IMAGE_FOLDERS][:1]
    if images and len(inner) > 1:
        where = f"{printable(name)}/ holds {folders_of(images)} beside {folders_of(sorted(inner - {*images}))}"
        refuse(base, f"{where}, which would be of one class; move the others away")
    copies = sorted((inner - {name}) & classes.keys())
    if len(copies) > 1 and len(copies) >= (len(classes) - 1) / 2:
        refuse(base, f"{folders_of(copies)} stand beside {printable(name)}/ and in it; move one copy away, or {alone}")


def leave_out_strays(listing: Listing, base: str) -> None:
    """Count a few images beside folders with images as left out. Raises: UserError where they are many."""
    full = {name: found for name, found in listing.subfolders(base).items() if found}
    own, inside = listing.count([base]), sum(map(listing.count, full.values()))
    if own > FEW * (own + inside):
        names = listed(listing.files[base], text=printable)
        where = f"{own:,} images ({names}) beside {folders_of([*full])} with {inside:,} images"
        refuse(base, f"{where}; move the ones or the others away")
    if own:
        listing.left_out[STRAY] += own


def refuse_lost_part(listing: Listing, base: str) -> None:
    """Refuse a part that is a link to nowhere, or to a folder that is listed already."""
    for link in [*listing.repeats, *listing.unusable]:
        if os.path.dirname(link) == base and part_of(os.path.basename(link)):
            first = listing.repeats.get(link)
            where = f"to {first}, which is listed already" if first else "nowhere"
            refuse(base, f"the link {printable(os.path.basename(link))} leads {where}; mend it or remove it")


def refuse_repeats_between(listing: Listing, base: str, names: tuple[str, str]) -> None:
    """Refuse two parts that share a directory through a link."""
    for link, first in listing.repeats.items():
        tops = {os.path.relpath(path, base).partition(os.sep)[0] for path in (link, first)}
        if tops == set(names):
            refuse(base, f"{link} leads to {first}: training and held-out images would be the same")


def refuse_different_classes(base: str, train: Part, test: Part) -> None:
    """Refuse parts of which one has class folders and the other has not, and parts without a common class."""
    if train.classes.keys() & test.classes.keys():
        return
    alone = f"or give --data.root {os.path.join(base, train.name)} to do without {test.name}/"
    for part, other in ((train, test), (test, train)):
        if "" in part.classes:
            text = f"{part.name}/ has no class folders, {other.name}/ has {len(other.classes):,} ({class_names(other)})"
            refuse(base, f"{text}; sort {part.name}/ into class folders, {alone}")
    refuse(
        base,
        f"no class of {test.name}/ ({class_names(test)}) is one of {train.name}/ ({class_names(train)}); "
        f"rename them, {alone}",
    )


def class_names(part: Part) -> str:
    """The first names of classes as text."""
    return listed(part.classes, text=printable)


def folders_of(names: list[str]) -> str:
    """The first names of folders as text."""
    return listed(names, text=lambda name: f"{printable(name)}/")


def refuse(base: str, why: str) -> NoReturn:
    raise UserError(f"--data.root {printable(base, None)}: {why}")

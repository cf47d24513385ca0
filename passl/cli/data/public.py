"""``passl-data cifar10``, ``cifar100``, ``imagenet-folder`` and ``imagenet-hf``"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

if TYPE_CHECKING:
    from passl.data.public.cifar import Cifar
    from passl.data.public.output import SplitReport, SplitSource

_DOWNLOADS = Path("dataset/downloads")
_INTERRUPTED = 130  # as a shell says that Ctrl-C ended a command

_CIFAR = """\
{title}: 50,000 training and 10,000 test images of 32 x 32 pixels, {classes}.

  passl-data {name}                  download, and write dataset/{name}/{{train,test}}/<class>/*.png
  passl-data {name} --from ARCHIVE   the same without a network: {archive}
  passl-data {name} --from FOLDER    an unpacked archive, or class folders in train and test
  passl-data {name} --tar            tarballs with an index, for TarDataset, not {number} files

Disk: {size} for the archive, 250 MB for the class folders, 200 MB for the tarballs. Images are lossless (PNG); their
number is their place in the archive. An interrupted download or conversion goes on when the command is typed again;
what is complete is left alone. Nothing in the archive is executed.
"""
_FOLDER = """\
ImageNet (ILSVRC 2012) from the files that you have, as class folders {train,val}/<WordNet id>/*.JPEG.

  passl-data imagenet-folder --from FOLDER           a folder with the official archives:
                                                       ILSVRC2012_img_train.tar (148 GB)
                                                       ILSVRC2012_img_val.tar (6.7 GB)
                                                       ILSVRC2012_devkit_t12.tar.gz (2.5 MB: the classes of val)
  passl-data imagenet-folder --from KAGGLE --link hard
                                                     the unpacked Kaggle edition: ILSVRC/Data/CLS-LOC/{train,val} and
                                                     LOC_val_solution.csv
  passl-data imagenet-folder --from val.tar --val-labels LOC_val_solution.csv
  passl-data imagenet-folder --from FOLDER --tar     tarballs with an index, for TarDataset, not 1.3 million files

The archives are for registered users: https://image-net.org/download-images. Images are written as they are, without
unpacking anything twice. Disk: 155 GB besides the archives; with --link hard, none. An interrupted run goes on with the
class where it was stopped when the command is typed again; what is complete is left alone.
"""
_HUB = """\
ImageNet-1k from the Hugging Face hub, as class folders {train,val}/<WordNet id>/*.JPEG.

  pip install "passl[hf]"
  HF_TOKEN=hf_... passl-data imagenet-hf             or a file .env in this folder, with a line HF_TOKEN=hf_...
  passl-data imagenet-hf --split val                 7 GB of 155
  passl-data imagenet-hf --from FOLDER               parquet files that are there already
  passl-data imagenet-hf --tar                       tarballs with an index, for TarDataset, not 1.3 million files

Before, accept the licence at https://huggingface.co/datasets/ILSVRC/imagenet-1k, and make a token that may read at
https://huggingface.co/settings/tokens. It is never printed. Disk: 155 GB, and 0.5 GB for the file being converted: each
is deleted afterwards. An interrupted run goes on with the file where it was stopped when the command is typed again;
what is complete is left alone.
"""


class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Examples as they are, and those defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> Optional[str]:
        return super()._get_help_string(action) if action.default else action.help


def add_to(commands: Any) -> None:
    _add_cifar(commands, "cifar10", "CIFAR-10", "ten classes", "cifar-10-python.tar.gz", "171 MB")
    _add_cifar(commands, "cifar100", "CIFAR-100", "100 classes", "cifar-100-python.tar.gz", "169 MB")
    _add_imagenet_folder(commands)
    _add_imagenet_hf(commands)


def _add_cifar(commands: Any, name: str, title: str, classes: str, archive: str, size: str) -> None:
    text = _CIFAR.format(name=name, title=title, classes=classes, archive=archive, size=size, number="60,000")
    add = _new(commands, name, f"{title}: download, and write class folders or tarballs", text, f"dataset/{name}")
    add("--from", dest="source", type=Path, metavar="PATH", help="an archive (pickled or binary version) or a folder")
    if name == "cifar100":
        add("--coarse", action="store_true", help="the 20 superclasses as classes")
    add("--url", metavar="ADDRESS", help="of a copy of the archive on another server")
    add("--md5", help="of that copy, if it is another file than the published one")
    add("--downloads", type=Path, default=_DOWNLOADS, metavar="FOLDER", help="where the archive is kept")
    commands.choices[name].set_defaults(run=_resumable(_run_cifar))


def _add_imagenet_folder(commands: Any) -> None:
    name = "imagenet-folder"
    add = _new(commands, name, "ImageNet from its archives or the Kaggle edition", _FOLDER, "dataset/ILSVRC2012")
    add(
        "--from",
        dest="source",
        type=Path,
        nargs="+",
        metavar="PATH",
        help=f"archives, or folders with archives or with train and val (default: {_DOWNLOADS})",
    )
    add(
        "--val-labels",
        type=Path,
        metavar="FILE",
        help="the development kit, LOC_val_solution.csv, or a list of WordNet ids",
    )
    add("--split", choices=("train", "val"), help="only this one")
    add(
        "--link",
        choices=("copy", "hard", "symbolic"),
        default="copy",
        help="how image files of a folder get to theirs: hard links take no room and need the same disk",
    )
    add("--verify", action="store_true", help="compare the archives' MD5 with the published ones before (minutes)")
    commands.choices[name].set_defaults(run=_resumable(_run_imagenet_folder))


def _add_imagenet_hf(commands: Any) -> None:
    name = "imagenet-hf"
    add = _new(commands, name, "ImageNet-1k from the Hugging Face hub", _HUB, "dataset/ILSVRC2012")
    add("--from", dest="source", type=Path, metavar="FOLDER", help="with the repository's parquet files")
    add("--split", choices=("train", "val"), help="only this one")
    add("--downloads", type=Path, default=_DOWNLOADS, metavar="FOLDER", help="where parquet files go meanwhile")
    add("--keep-downloads", action="store_true", help="do not delete them")
    commands.choices[name].set_defaults(run=_resumable(_run_imagenet_hf))


def _new(commands: Any, name: str, summary: str, text: str, out: str) -> Callable[..., Any]:
    parser = commands.add_parser(name, help=summary, description=text, formatter_class=_Help)
    parser.add_argument("--out", type=Path, default=Path(out), metavar="FOLDER", help="folder to write to")
    parser.add_argument("--tar", action="store_true", help="write tarballs and their index, not class folders")
    return parser.add_argument


def _resumable(run: Callable[[argparse.Namespace], None]) -> Callable[[argparse.Namespace], None]:
    def until_interrupted(options: argparse.Namespace) -> None:
        try:
            run(options)
        except KeyboardInterrupt:
            print("\nstopped; type the same command again, and it goes on", file=sys.stderr)
            sys.exit(_INTERRUPTED)

    return until_interrupted


# --- CIFAR ----------------------------------------------------------------------------------------------------------


def _run_cifar(options: argparse.Namespace) -> None:
    from passl.data.public.cifar import CIFAR10, CIFAR100, IMAGES, cifar_splits

    cifar = {each.name: each for each in (CIFAR10, CIFAR100)}[options.command]
    kind = next(iter(cifar.labels))
    if getattr(options, "coarse", False):
        kind = "coarse"

    def sources() -> dict[str, SplitSource]:
        if options.source:
            _note_md5(options.source, cifar.archives)
        return cifar_splits(options.source or _cifar_archive(cifar, options), cifar, kind)

    _convert(options, {"data set": cifar.name, "labels": kind}, IMAGES, sources)


def _cifar_archive(cifar: Cifar, options: argparse.Namespace) -> Path:
    """The archive, downloaded if it is not there."""
    from passl.download import DownloadError, fetch_known

    file = options.downloads / cifar.archive
    md5 = options.md5 or cifar.archives[cifar.archive]
    try:
        return fetch_known([options.url] if options.url else cifar.addresses, file, md5)
    except DownloadError as error:
        raise DownloadError(
            f"{error}\nWithout a network: fetch {cifar.addresses[-1]} ({cifar.archive_size}, MD5 {md5}) elsewhere, put "
            f"it at {file}, and type the same command again; or: passl-data {cifar.name} --from FILE"
        ) from None


def _note_md5(path: Path, published: dict[str, str]) -> None:
    from passl.download import md5_of

    if path.is_file():
        digest = md5_of(path)
        if digest not in published.values():
            print(f"note: {path} is not the published archive (its MD5 is {digest}); it is converted as it is")


# --- ImageNet -------------------------------------------------------------------------------------------------------


def _run_imagenet_folder(options: argparse.Namespace) -> None:
    from passl.data.public.imagenet import IMAGES, find, train_source, val_source

    def sources() -> dict[str, SplitSource]:
        try:
            found = find(options.source or [_DOWNLOADS], options.val_labels)
        except FileNotFoundError as error:
            if options.source:
                raise
            raise FileNotFoundError(f"{error}.\n{_where_to_put_imagenet()}") from None
        if options.verify:
            _verify(found)
        result = {}
        if found.train and options.split != "val":
            result["train"] = train_source(found.train)
        if found.val and options.split != "train":
            result["val"] = val_source(found.val, found.labels)
        return result

    _convert(options, {"data set": "imagenet"}, IMAGES, sources)


def _where_to_put_imagenet() -> str:
    from passl.data.public.imagenet import KIT, TRAIN_ARCHIVE, VAL_ARCHIVE

    return (
        "ImageNet's archives are for registered users, and cannot be downloaded from here. Log in at "
        f"https://image-net.org/download-images, put {TRAIN_ARCHIVE}, {VAL_ARCHIVE} and {KIT} into {_DOWNLOADS}, and "
        "type the same command again; or: passl-data imagenet-folder --from FOLDER. From the Hugging Face hub: "
        "passl-data imagenet-hf"
    )


def _verify(found: Sequence[Optional[Path]]) -> None:
    from passl.data.public.imagenet import MD5
    from passl.download import md5_of

    for path in found:
        if path is None or path.name not in MD5 or not path.is_file():
            continue
        digest = md5_of(path)
        if digest != MD5[path.name]:
            raise ValueError(f"{path} is damaged or another file: its MD5 is {digest}, the published {MD5[path.name]}")
        print(f"{path}: MD5 as published")


def _run_imagenet_hf(options: argparse.Namespace) -> None:
    from passl.data.public.hub import Hub, folder_splits, hub_splits
    from passl.data.public.imagenet import IMAGES

    def sources() -> dict[str, SplitSource]:
        if options.source:
            return folder_splits(options.source)
        return hub_splits(Hub(options.downloads / "imagenet-1k", _hub_token()), options.keep_downloads)

    _convert(options, {"data set": "imagenet"}, IMAGES, sources)


def _hub_token() -> Optional[str]:
    return os.environ.get("HF_TOKEN") or read_dotenv(Path(".env")).get("HF_TOKEN")


def read_dotenv(path: Path) -> dict[str, str]:
    """The variables in a `.env` file, if there is one: lines `NAME=value`, as python-dotenv reads them, without its
    replacement of `${NAME}`.
    """
    values: dict[str, str] = {}
    if not path.is_file():
        return values
    for line in path.read_text(encoding="utf-8-sig", errors="replace").splitlines():
        name, equals, value = line.strip().partition("=")
        name = name.removeprefix("export ").strip()
        if not equals or not name or name.startswith("#"):
            continue
        value = value.strip()
        if value[:1] in ("'", '"') and value.find(value[0], 1) > 0:
            value = value[1 : value.find(value[0], 1)]
        else:
            value = value.partition(" #")[0].strip()
        values[name] = value
    return values


# --- what all do ----------------------------------------------------------------------------------------------------


def _convert(
    options: argparse.Namespace,
    settings: dict[str, str],
    published: dict[str, int],
    sources: Callable[[], dict[str, SplitSource]],
) -> None:
    """Write the splits that are not complete, then the index of tarballs, and say what there is."""
    from passl.data.public.output import Split

    link = getattr(options, "link", "copy")
    if options.tar and link != "copy":
        raise ValueError(f"a tarball holds the images themselves: leave out --link {link}, or --tar")
    wanted = [name for name in published if getattr(options, "split", None) in (None, name)]
    # Tarballs in one folder share the numbers of their classes: one that an earlier run wrote counts too.
    names = list(published) if options.tar else wanted
    splits = {name: Split(options.out, name, settings, published[name], options.tar, link) for name in names}
    reports = {name: split.complete() for name, split in splits.items()}
    if not all(reports[name] for name in wanted):
        found = sources()
        for name in wanted:
            if reports[name] is None and name in found:
                reports[name] = splits[name].write(found[name])
    if not any(reports[name] for name in wanted):
        raise FileNotFoundError(f"nothing of {' and '.join(wanted)} is there")
    if options.tar:
        _index(options.out, {name: report for name, report in reports.items() if report})
    for name in wanted:
        _say(name, reports[name], published[name])


def _say(name: str, report: Optional[SplitReport], published: int) -> None:
    if report is None:
        print(f"note: there was nothing of {name}: it is not written")
        return
    done = ", complete already" if report.was_complete else ""
    print(f"{report.path}: {report.images} images in {len(report.classes)} classes{done}")
    if report.part:
        print(f"note: there were only {report.part} of {name}; with more of them, delete it and convert it again")
    elif report.images != published:
        print(f"note: the published data set has {published} images in {name}")


def _index(out: Path, reports: dict[str, SplitReport]) -> None:
    """Of the tarballs, with the same numbers for the same classes."""
    from tqdm import tqdm

    from passl.data.tar_index import entries_name, index_tarball
    from passl.data.tar_lists import FolderLabels

    classes = sorted({name for report in reports.values() for name in report.classes})
    if all(report.was_complete and (out / entries_name(name)).is_file() for name, report in reports.items()):
        return
    for name, report in reports.items():
        with tqdm(unit="B", unit_scale=True, desc=f"index of {name}", disable=None) as bar:

            def show(passed: int, total: int, bar: tqdm = bar) -> None:
                bar.total = total
                bar.update(passed - bar.n)

            index_tarball(report.path, out, prefix=name, labels=FolderLabels(classes), force=True, progress=show)
    print(f"a configuration reads them as {{name: TarDataset, root: {out}, prefix: {next(iter(reports))}}}")

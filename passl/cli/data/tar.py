"""``passl-data tar-index`` and ``passl-data tar-check``"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from passl.cli.common import RUN_ERROR

_INDEX = """\
Write the index of a tarball: where each of its images is, so that training reads them without unpacking.

  tar -cf pretrain_dataset.tar IMAGES/
  passl-data tar-index --tarball_path pretrain_dataset.tar --output_root DATA --prefix pretrain

Then, with the tarball in the same folder DATA, a configuration reads it:

  DataLoader: {Train: {dataset: {name: TarDataset, root: DATA, prefix: pretrain, transform: {name: MultiCrop}}}}

Files written, which the clemsgrs code reads and writes too:
  PREFIX_entries[_SUFFIX].npy   uint64 [N, 4]: class index, file index, start, end (bytes of the tarball)
  PREFIX_file_indices.npy       {file index: base name} of all files
  cohort_indices.npy            of several tarballs: {number: stem}; the entries are [N, 5], with that number
  class-ids.npy                 with labels: rows (label, class name), shared by the indices of a folder
"""


_CHECK = """\
Decode every image of tarballs and folders; name those that cannot be read, and those that occur twice.

  passl-data tar-check pretrain_dataset.tar --report problems.csv --good good.txt
  passl-data tar-index --tarball_path pretrain_dataset.tar --output_root DATA --restrict good.txt

Exit code 1 if an image is corrupt or a tarball damaged; duplicates are only named.
"""
_MAX_SHOWN = 20


def add_to(commands: Any) -> None:
    _add_index(commands)
    _add_check(commands)


def _add_index(commands: Any) -> None:
    parser = commands.add_parser(
        "tar-index",
        help="write the index of a tarball, for training without unpacking it",
        description=_INDEX,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def add(name: str, *others: str, **settings: Any) -> None:
        names = dict.fromkeys([name, *others, name.replace("_", "-")])
        parser.add_argument(*names, dest=name[2:], **settings)

    more = "several: each gets an index with its stem as prefix, and all together get one with PREFIX"
    add("--tarball_path", "-t", nargs="+", type=Path, required=True, metavar="TAR", help=f"a tarball, or {more}")
    add("--output_root", "-o", type=Path, required=True, metavar="FOLDER", help="where to write the index")
    add("--prefix", "-p", "--name", default="pretrain", help="of the names of the index's files (default: pretrain)")
    lists = "names, one a line, or a .csv with a column 'filename'; a name is a base name or a path in the tarball"
    add("--restrict", "-r", "--keep", metavar="LIST", help=f"take only these files: {lists}")
    add("--remove", metavar="LIST", help="take all but these files")
    add("--suffix", "-s", help="for a part of the tarball: --restrict fold0.txt --suffix fold0")
    columns = "columns 'filename', 'label' (numbers from 0, or words) and, optionally, 'class' (the class's name)"
    add("--csv", "-c", metavar="CSV", help=f"labels: {columns}")
    add("--folder_labels", action="store_true", help="labels: the class of a file is the folder it lies in")
    add("--file_name", "-f", default="filename", metavar="COLUMN", help="name of the column of file names")
    add("--label_name", "-l", default="label", metavar="COLUMN", help="name of the column of labels")
    add("--class_name", "-n", default="class", metavar="COLUMN", help="name of the column of class names")
    add("--skip_special", action="store_true", help="leave out hard links and sparse files instead of stopping")
    add("--ignore_zeros", "-i", action="store_true", help="read on behind the archive's end (tarballs joined with cat)")
    add("--force", action="store_true", help="overwrite the index of another tarball")
    parser.set_defaults(run=_run_index)


def _add_check(commands: Any) -> None:
    parser = commands.add_parser(
        "tar-check",
        help="find corrupt and duplicate images in tarballs and folders",
        description=_CHECK,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("paths", nargs="+", type=Path, metavar="PATH", help="a tarball, a folder with tarballs, or a folder of images")
    add("--report", type=Path, metavar="FILE", help="write all problems: .csv, or .json")
    add("--good", type=Path, metavar="FILE", help="write the names of the readable images, for tar-index --restrict")
    add("--unique", action="store_true", help="of equal images, only the first is good")
    add("--num_workers", "--num-workers", type=int, metavar="N", help="processes that decode (default: one a core)")
    parser.set_defaults(run=_run_check)


def _run_index(options: argparse.Namespace) -> None:
    from passl.data.tar_index import index_tarball, join_indices
    from passl.data.tar_lists import CsvLabels, FolderLabels, NameList

    tarballs = options.tarball_path
    for one, other in (("restrict", "remove"), ("csv", "folder_labels")):
        if getattr(options, one) and getattr(options, other):
            raise ValueError(f"--{one} and --{other} exclude each other")
    if len(tarballs) > 1 and options.folder_labels:
        raise ValueError("--folder_labels numbers the folders of one tarball: label several by a --csv")
    labels = FolderLabels() if options.folder_labels else None
    if options.csv:
        labels = CsvLabels(options.csv, options.file_name, options.label_name, options.class_name)
    keep = NameList(options.restrict, options.file_name) if options.restrict else None
    remove = NameList(options.remove, options.file_name) if options.remove else None
    for tarball in tarballs:
        with _progress("B") as show:
            index = index_tarball(
                tarball,
                options.output_root,
                prefix=options.prefix if len(tarballs) == 1 else tarball.stem,
                suffix=options.suffix,
                keep=keep,
                remove=remove,
                labels=labels,
                skip_special=options.skip_special,
                ignore_zeros=options.ignore_zeros,
                force=options.force,
                progress=show,
            )
        for note in index.notes:
            print(f"note: {note}")
        classes = f" of {index.classes} classes" if index.classes else ""
        print(f"{index.entries_path}: {index.entries} of {index.files} files{classes}")
    if len(tarballs) > 1:
        path = join_indices(options.output_root, tarballs, options.prefix, options.suffix)
        print(f"{path}: all {len(tarballs)} tarballs")


def _run_check(options: argparse.Namespace) -> None:
    from passl.data.tar_check import check_images

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = cores if options.num_workers is None else options.num_workers
    with _progress("image") as show:
        report = check_images(options.paths, workers, show)
    for note in report.notes:
        print(f"note: {note}")
    images = report.images
    corrupt = [f"{images[number]}: {reason}" for number, reason in report.corrupt.items()]
    duplicates = [" = ".join(str(images[number]) for number in group) for group in report.duplicates]
    for title, lines in (("damaged", report.damage), ("corrupt", corrupt), ("duplicate", duplicates)):
        for line in lines[:_MAX_SHOWN]:
            print(f"{title}: {line}")
        if len(lines) > _MAX_SHOWN:
            print(f"{title}: and {len(lines) - _MAX_SHOWN} more; --report FILE has all")
    if options.report is not None:
        _write_report(options.report, report)
    if options.good is not None:
        names = "".join(f"{name}\n" for name in report.good_names(options.unique))
        _write_text(options.good, names)
    copies = sum(len(group) - 1 for group in report.duplicates)
    print(f"{len(images)} images: {len(corrupt)} corrupt, {copies} duplicate of another")
    if corrupt or report.damage:
        sys.exit(RUN_ERROR)


def _write_report(path: Path, report: Any) -> None:
    """All problems as rows: problem, image, tarball, name, offset, size, and the reason or the image it equals."""
    rows = [
        {"problem": "corrupt", **_fields(report.images[number]), "detail": reason}
        for number, reason in report.corrupt.items()
    ]
    for first, *copies in report.duplicates:
        original = str(report.images[first])
        rows += [{"problem": "duplicate", **_fields(report.images[number]), "detail": original} for number in copies]
    rows += [dict.fromkeys(_fields(None), "") | {"problem": "damaged", "detail": text} for text in report.damage]
    if path.suffix.lower() == ".json":
        _write_text(path, json.dumps({"checked": len(report.images), "problems": rows}, indent=1) + "\n")
        return
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, ["problem", *_fields(None), "detail"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    _write_text(path, text.getvalue())


def _fields(image: Any) -> dict[str, Any]:
    names = ("tarball", "name", "offset", "size")
    return {name: getattr(image, name, "") for name in names}


def _write_text(path: Path, text: str) -> None:
    from passl.formats.atomic import replacing

    # Names in a tarball are any bytes: they leave as they came.
    with replacing(path.expanduser()) as file:
        file.write(text.encode("utf-8", "surrogateescape"))


@contextlib.contextmanager
def _progress(unit: str) -> Iterator[Callable[[int, int], None]]:
    """A function (done, total) that moves a bar."""
    from tqdm import tqdm

    with tqdm(unit=unit, unit_scale=unit == "B", disable=None) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show

"""``passl-data tar-index`` and ``passl-data tar-check``"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

_INDEX = """\
Write the index of a tarball: where each of its images is, so that training reads them without unpacking.

  tar -cf pretrain_dataset.tar IMAGES/
  passl-data tar-index --tarball_path pretrain_dataset.tar --output_root DATA --prefix pretrain

Then, with the tarball in the same folder DATA, a configuration reads it:

  DataLoader: {Train: {dataset: {name: TarDataset, root: DATA, prefix: pretrain, ...}}}

Files written, which the clemsgrs code reads and writes too:
  PREFIX_entries[_SUFFIX].npy   uint64 [N, 4]: class index, file index, start, end (bytes of the tarball)
  PREFIX_file_indices.npy       {file index: base name} of all files
  class-ids.npy                 with labels: rows (label, class name), shared by the indices of a folder
"""


def add_to(commands: Any) -> None:
    parser = commands.add_parser(
        "tar-index",
        help="write the index of a tarball, for training without unpacking it",
        description=_INDEX,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def add(name: str, *aliases: str, **settings: Any) -> None:
        names = [name, *aliases]
        dashed = [f"--{each[2:].replace('_', '-')}" for each in names if "_" in each]
        parser.add_argument(*names, *dashed, **{"dest": name[2:], **settings})

    add("--tarball_path", "-t", type=Path, required=True, metavar="TAR", help="an uncompressed tarball")
    add("--output_root", "-o", type=Path, required=True, metavar="FOLDER", help="where to write the index")
    add("--prefix", "-p", "--name", default="pretrain", help="of the names of the index's files (default: pretrain)")
    add(
        "--restrict",
        "-r",
        "--keep",
        metavar="LIST",
        help="take only these files: .txt, a name a line, or .csv with "
        "a column 'filename'; a name is a base name or a path in the tarball",
    )
    add("--remove", metavar="LIST", help="take all but these files")
    add(
        "--suffix",
        "-s",
        help="of the name of the entries, for a part of the tarball: --restrict fold0.txt --suffix fold0",
    )
    add(
        "--csv",
        "-c",
        metavar="CSV",
        help="labels: columns 'filename', 'label' (numbers from 0, or words) and, "
        "optionally, 'class' (the class's name)",
    )
    add("--folder_labels", action="store_true", help="labels: the class of a file is the folder it lies in")
    add("--file_name", "-f", default="filename", metavar="COLUMN", help="name of the column of file names")
    add("--label_name", "-l", default="label", metavar="COLUMN", help="name of the column of labels")
    add("--class_name", "-n", default="class", metavar="COLUMN", help="name of the column of class names")
    add("--skip_special", action="store_true", help="leave out hard links and sparse files instead of stopping")
    add(
        "--ignore_zeros",
        "-i",
        action="store_true",
        help="read on behind the end of the archive, for tarballs joined with cat",
    )
    add("--force", action="store_true", help="overwrite the index of another tarball")
    parser.set_defaults(run=_run_index)


def _run_index(options: argparse.Namespace) -> None:
    from tqdm import tqdm

    from passl.data.tar_index import index_tarball
    from passl.data.tar_lists import CsvLabels, FolderLabels, NameList

    if options.restrict and options.remove:
        raise ValueError("--restrict and --remove exclude each other")
    if options.csv and options.folder_labels:
        raise ValueError("--csv and --folder_labels exclude each other")
    labels = FolderLabels() if options.folder_labels else None
    if options.csv:
        labels = CsvLabels(options.csv, options.file_name, options.label_name, options.class_name)
    with tqdm(unit="B", unit_scale=True, disable=None) as bar:

        def show(passed: int, total: int) -> None:
            bar.total = total
            bar.update(passed - bar.n)

        index = index_tarball(
            options.tarball_path,
            options.output_root,
            prefix=options.prefix,
            suffix=options.suffix,
            keep=NameList(options.restrict, options.file_name) if options.restrict else None,
            remove=NameList(options.remove, options.file_name) if options.remove else None,
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

"""Corrupt and equal images in tarballs and folders, and the commands `tar-index` and `tar-check`."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from passl.cli import data_main
from passl.data.tar_check import check_images
from tests.data.tarballs import header, image_bytes, member, write_tarball

IMAGE = image_bytes(1, (40, 40), "JPEG")
FILES = {
    "a/1.png": image_bytes(0),
    "a/2.jpg": IMAGE,
    "b/cut.jpg": IMAGE[: len(IMAGE) // 2],
    "b/copy.jpg": IMAGE,
    "c/empty.png": b"",
    "c/text.jpg": b"no image",
    "text again.jpg": b"no image",
    "1.png": image_bytes(3),
    "copy of 2.jpg": IMAGE,
}
CORRUPT = ["b/cut.jpg", "c/empty.png", "c/text.jpg", "text again.jpg"]
COPIES = [["a/2.jpg", "b/copy.jpg", "copy of 2.jpg"]]


@pytest.fixture
def tarball(tmp_path) -> Path:
    write_tarball(tmp_path / "x.tar", FILES)
    return tmp_path / "x.tar"


def names(report, numbers) -> list[str]:
    return [report.images[number].name for number in numbers]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_corrupt_and_equal_images_are_found(tarball, num_workers):
    calls = []
    report = check_images([tarball], num_workers, lambda *call: calls.append(call))
    assert names(report, report.corrupt) == CORRUPT
    assert list(report.corrupt.values())[1:] == [
        "the file is empty (0 bytes)",
        "not an image that Pillow can identify",
        "not an image that Pillow can identify",
    ]
    assert [names(report, group) for group in report.duplicates] == COPIES
    assert str(report.images[3]) == f"{tarball}!b/copy.jpg (offset {report.images[3].offset})"
    assert tarball.read_bytes()[report.images[3].offset :][: report.images[3].size] == IMAGE
    assert calls[-1] == (9, 9)
    good = [name if "/" in name else f"./{name}" for name in FILES if name not in CORRUPT]
    assert list(report.good_names()) == good
    assert list(report.good_names(unique=True)) == ["a/1.png", "a/2.jpg", "./1.png"]


def test_folders_with_and_without_tarballs(tarball, tmp_path):
    for name, data in FILES.items():
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    report = check_images([tmp_path, tarball, tmp_path / "images"])
    assert len(report.images) == 2 * len(FILES)
    assert len(report.corrupt) == 2 * len(CORRUPT)
    equal = {tuple(names(report, group)) for group in report.duplicates}
    assert ("1.png", f"{tmp_path}/images/1.png") in equal
    with pytest.raises(FileNotFoundError, match="there is no file .*missing.tar"):
        check_images([tmp_path / "missing.tar"])


def test_damage_of_a_tarball_is_told_and_the_rest_is_checked(tarball, tmp_path):
    (tmp_path / "y.tar").write_bytes(
        member("good.jpg", IMAGE) + header("h.jpg", kind=b"1", linkname="good.jpg") + member("cut.jpg", IMAGE)[:700]
    )
    report = check_images([tmp_path / "y.tar", tarball])
    assert len(report.images) == 1 + len(FILES)
    assert len(report.damage) == 1
    assert "y.tar: cut off: at offset" in report.damage[0]
    assert report.notes == [f"left out: {tmp_path}/y.tar!h.jpg: a hard link"]


# --- commands -------------------------------------------------------------------------------------------------------


@pytest.mark.smoke
def test_check_then_index_what_is_good(tarball, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        data_main(
            [
                "tar-check",
                f"{tarball}",
                "--report",
                f"{tmp_path}/x.csv",
                "--good",
                f"{tmp_path}/good.txt",
                "--num_workers",
                "0",
            ]
        )
    assert stopped.value.code == 1
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == "9 images: 4 corrupt, 2 duplicate of another"
    assert printed[1].startswith(f"corrupt: {tarball}!c/empty.png (offset ")
    assert printed[4].startswith(f"duplicate: {tarball}!a/2.jpg (offset ")
    rows = list(csv.DictReader((tmp_path / "x.csv").open()))
    assert [row["name"] for row in rows] == [*CORRUPT, *COPIES[0][1:]]
    assert [row["problem"] for row in rows] == ["corrupt"] * 4 + ["duplicate"] * 2
    assert rows[-1]["detail"].startswith(f"{tarball}!a/2.jpg (offset ")

    data_main(
        [
            "tar-index",
            "--tarball-path",
            f"{tarball}",
            "--output-root",
            f"{tmp_path}/out",
            "--prefix",
            "good",
            "--restrict",
            f"{tmp_path}/good.txt",
        ]
    )
    assert capsys.readouterr().out == f"{tmp_path}/out/good_entries.npy: 5 of 9 files\n"
    content = tarball.read_bytes()
    found = [content[start:end] for _, _, start, end in np.load(tmp_path / "out/good_entries.npy").tolist()]
    assert found == [data for name, data in FILES.items() if name not in CORRUPT]


def test_a_good_tarball_s_check_ends_well(tmp_path, capsys):
    write_tarball(tmp_path / "x.tar", {"a.jpg": IMAGE, "b.jpg": IMAGE})
    data_main(["tar-check", f"{tmp_path}/x.tar", "--report", f"{tmp_path}/x.json", "--num-workers", "0"])
    assert capsys.readouterr().out.splitlines()[-1] == "2 images: 0 corrupt, 1 duplicate of another"
    report = json.loads((tmp_path / "x.json").read_text())
    assert report["checked"] == 2
    assert [row["name"] for row in report["problems"]] == ["b.jpg"]


def test_several_tarballs_get_one_index(reference, tmp_path, capsys):
    folder = reference / "tarball/foundation"
    cohorts = np.load(folder / "cohort_indices.npy", allow_pickle=True).item()
    tarballs = [str(folder / f"{cohort}.tar") for cohort in cohorts.values()]
    data_main(["tar-index", "--tarball_path", *tarballs, "--output_root", f"{tmp_path}"])
    assert capsys.readouterr().out.endswith(f"{tmp_path}/pretrain_entries.npy: all {len(tarballs)} tarballs\n")
    for name in ("pretrain_entries.npy", "cohort_indices.npy", f"{cohorts[0]}_file_indices.npy"):
        ours, recorded = (np.load(each / name, allow_pickle=True) for each in (tmp_path, folder))
        assert ours.dtype == recorded.dtype
        assert np.array_equal(ours, recorded)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--restrict", "a", "--remove", "b"], "--restrict and --remove exclude each other"),
        (["--csv", "a", "--folder_labels"], "--csv and --folder_labels exclude each other"),
        (["--restrict", "none.txt"], "there is no file none.txt"),
    ],
)
def test_errors_of_the_command(tarball, tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        data_main(["tar-index", "--tarball_path", f"{tarball}", "--output_root", f"{tmp_path}", *arguments])
    assert stopped.value.code == 1
    assert capsys.readouterr().err == f"error: {message}\n"

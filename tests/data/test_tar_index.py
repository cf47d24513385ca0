"""The index of a tarball: recorded ones, lists, labels, what is left out, and whose index may be overwritten."""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
import pytest

from passl.data.tar_index import index_tarball, join_indices
from passl.data.tar_lists import CsvLabels, FolderLabels, NameList
from passl.data.tar_members import TarError
from passl.data.tar_names import read_names
from tests.data.tarballs import END, header, member, write_tarball


def load(path: Path) -> np.ndarray:
    """As the clemsgrs code does."""
    return np.load(path, allow_pickle=True)


def assert_equal(ours: Path, recorded: Path) -> None:
    ours, recorded = load(ours), load(recorded)
    assert ours.dtype == recorded.dtype
    assert ours.shape == recorded.shape
    assert np.array_equal(ours, recorded)


def taken(index, files: dict[str, bytes], tarball: Path) -> list[str]:
    """The paths of the files in an index, by their bytes."""
    content, path_of = tarball.read_bytes(), {data: path for path, data in files.items()}
    return [path_of[content[start:end]] for _, _, start, end in load(index.entries_path).tolist()]


def write_list(path: Path, *lines: str) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


FILES = {"top.jpg": b"0", "a": None, "a/1.jpg": b"1", "a/2.jpg": b"22", "b/1.jpg": b"333", "b/read me.txt": b"4444"}


@pytest.fixture
def tarball(tmp_path) -> Path:
    write_tarball(tmp_path / "x.tar", FILES)
    return tmp_path / "x.tar"


# --- recordings -----------------------------------------------------------------------------------------------------


@pytest.mark.smoke
def test_recorded_index_of_pretraining_images_and_of_its_parts(reference, tmp_path):
    folder = reference / "tarball/pathology"
    tarball = folder / "pretrain_dataset.tar"
    index = index_tarball(tarball, tmp_path)
    assert_equal(index.entries_path, folder / "pretrain_entries.npy")
    assert_equal(index.names_path, folder / "pretrain_file_indices.npy")
    names = load(folder / "pretrain_file_indices.npy").item()
    parts = list(folder.glob("pretrain_entries_*.npy"))
    assert parts
    for path in parts:
        suffix = path.stem.removeprefix("pretrain_entries_")
        chosen = write_list(tmp_path / "names.txt", *(names[row[1]] for row in load(path).tolist()))
        others = write_list(tmp_path / "names.csv", *(set(names.values()) - set(chosen.read_text().splitlines())))
        index = index_tarball(tarball, tmp_path, suffix=suffix, keep=NameList(chosen))
        assert_equal(index.entries_path, path)
        index = index_tarball(tarball, tmp_path, suffix=suffix, remove=NameList(others))
        assert_equal(index.entries_path, path)
    assert_equal(index.names_path, folder / "pretrain_file_indices.npy")
    for path in folder.glob("keep_*.csv"):
        index = index_tarball(tarball, tmp_path, keep=NameList(path))
        assert index.entries == len(set(path.read_text().split("\n")) & set(names.values()))


def test_recorded_index_over_several_tarballs(reference, tmp_path):
    folder = reference / "tarball/foundation"
    tarballs = [folder / f"{cohort}.tar" for cohort in load(folder / "cohort_indices.npy").item().values()]
    for tarball in tarballs:
        index = index_tarball(tarball, tmp_path, prefix=tarball.stem)
        assert_equal(index.entries_path, folder / f"{tarball.stem}_entries.npy")
        assert_equal(index.names_path, folder / f"{tarball.stem}_file_indices.npy")
    assert_equal(join_indices(tmp_path, tarballs), folder / "pretrain_entries.npy")
    assert_equal(tmp_path / "cohort_indices.npy", folder / "cohort_indices.npy")


def test_recorded_labelled_index_of_two_parts_of_one_tarball(reference, tmp_path):
    folder = reference / "tarball/knn"
    (tarball,) = folder.glob("*.tar")
    for path in folder.glob("*_entries.npy"):
        prefix = path.stem.removesuffix("_entries")
        names = load(folder / f"{prefix}_file_indices.npy").item()
        chosen = write_list(tmp_path / "names.txt", *(names[row[1]] for row in load(path).tolist()))
        labels = CsvLabels(folder / "labels.csv")
        index = index_tarball(tarball, tmp_path, prefix, keep=NameList(chosen), labels=labels)
        assert_equal(index.entries_path, path)
        assert_equal(index.names_path, folder / f"{prefix}_file_indices.npy")
        assert_equal(index.class_ids_path, folder / "class-ids.npy")


# --- names and lists ------------------------------------------------------------------------------------------------


def test_base_names_may_repeat_and_the_prefix_may_be_none(tarball, tmp_path):
    index = index_tarball(tarball, tmp_path / "out", prefix=None)
    assert (index.entries_path.name, index.names_path.name) == ("entries.npy", "file_indices.npy")
    assert load(index.names_path).item() == dict(enumerate(["top.jpg", "1.jpg", "2.jpg", "1.jpg", "read me.txt"]))
    assert taken(index, FILES, tarball) == [path for path, data in FILES.items() if data]
    assert index.notes == [
        "1 file(s) without an image's extension are in the index: b/read me.txt. Leave them out with --remove"
    ]


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["1.jpg"], ["a/1.jpg", "b/1.jpg"]),
        (["b/1.jpg", "top.jpg"], ["top.jpg", "b/1.jpg"]),
        (["./a/2.jpg", "./top.jpg", "./1.jpg"], ["top.jpg", "a/2.jpg"]),
        (["", "read me.txt\r"], ["b/read me.txt"]),
    ],
)
def test_a_list_has_base_names_or_paths(tarball, tmp_path, lines, expected):
    names = write_list(tmp_path / "names.txt", *lines)
    kept = index_tarball(tarball, tmp_path, suffix="some", keep=NameList(names))
    assert taken(kept, FILES, tarball) == expected
    rest = index_tarball(tarball, tmp_path, remove=NameList(names))
    assert sorted(taken(rest, FILES, tarball) + expected) == sorted(path for path, data in FILES.items() if data)


def test_a_csv_list_has_a_column_or_only_one(tarball, tmp_path):
    for lines in (["id,filename", "7,2.jpg", "8,"], ["filename", "2.jpg"], ["2.jpg"], ['"2.jpg"']):
        names = write_list(tmp_path / "names.csv", *lines)
        assert taken(index_tarball(tarball, tmp_path, keep=NameList(names)), FILES, tarball) == ["a/2.jpg"]
    with pytest.raises(TarError, match="line 1: the header must name the column 'filename'; it is 'id,name'"):
        NameList(write_list(tmp_path / "names.csv", "id,name", "7,2.jpg"))
    with pytest.raises(TarError, match="names.txt lists no files"):
        NameList(write_list(tmp_path / "names.txt", "", " "))
    with pytest.raises(FileNotFoundError, match="there is no file .*missing.txt"):
        NameList(tmp_path / "missing.txt")


def test_names_that_are_not_in_the_tarball_are_told(tarball, tmp_path):
    names = NameList(write_list(tmp_path / "names.txt", "2.jpg", *(f"{i}.png" for i in range(12))))
    shown = ", ".join(f"{i}.png" for i in range(10))
    notes = index_tarball(tarball, tmp_path, keep=names).notes
    assert notes == [f"12 name(s) of {tmp_path}/names.txt are not in the tarball: {shown} and 2 more"]
    none = NameList(write_list(tmp_path / "names.txt", "x.png"))
    with pytest.raises(TarError, match="none of the 5 files in .*x.tar is left by .*names.txt"):
        index_tarball(tarball, tmp_path, keep=none)


# --- labels ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "labels", "classes"),
    [
        (["filename,label,class", "1.jpg,1,one", "2.jpg,0,zero"], [1, 0], [[1, "one"], [0, "zero"]]),
        (["x,label,filename", ",4,1.jpg", ",2,2.jpg"], [4, 2], [[4, "class_4"], [2, "class_2"]]),
        (["filename,label", "c/1.jpg,dog", "2.jpg,cat"], [1, 0], [[1, "dog"], [0, "cat"]]),
        (["filename,class", "1.jpg,dog", "2.jpg,cat"], [1, 0], [[1, "dog"], [0, "cat"]]),
        (["filename,label,class", "1.jpg,1.0,one", "2.jpg,0.0,zero"], [1, 0], [[1, "one"], [0, "zero"]]),
    ],
)
def test_labels_of_a_csv(tmp_path, lines, labels, classes):
    write_tarball(tmp_path / "x.tar", {"c/1.jpg": b"1", "c/2.jpg": b"2"})
    index = index_tarball(tmp_path / "x.tar", tmp_path, labels=CsvLabels(write_list(tmp_path / "x.csv", *lines)))
    assert load(index.entries_path)[:, 0].tolist() == labels
    assert load(index.class_ids_path).tolist() == classes
    assert index.classes == 2


def test_labels_of_files_of_one_name_need_paths(tarball, tmp_path):
    only = NameList(write_list(tmp_path / "only.txt", "1.jpg"))
    labels = CsvLabels(write_list(tmp_path / "x.csv", "filename,label", "1.jpg,3"))
    with pytest.raises(TarError, match="which label has '1.jpg': 'a/1.jpg' or 'b/1.jpg'. Write their paths"):
        index_tarball(tarball, tmp_path, keep=only, labels=labels)
    labels = CsvLabels(write_list(tmp_path / "x.csv", "filename,label", "a/1.jpg,3", "./b/1.jpg,4"))
    assert load(index_tarball(tarball, tmp_path, keep=only, labels=labels).entries_path)[:, 0].tolist() == [3, 4]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["file,label"], "line 1: the header must name the columns 'filename' and 'label' .*; it is 'file,label'"),
        (["filename,label"], "has no rows"),
        (["filename,label", "1.jpg,"], "line 2: no filename or no label"),
        (
            ["filename,label", "1.jpg,1", "1.jpg,2"],
            "line 3: '1.jpg' has label 2 here and 1 above: where files of",
        ),
        (["filename,label,class", "1.jpg,1,a", "2.jpg,1,b"], "line 3: label 1 is called 'b' here and 'a' above"),
        (["filename,label", "1.jpg,0", "2.jpg,-1"], "line 3: labels are whole numbers from 0, or words, not -1"),
        (["filename,label", '"1.jpg,0', "2.jpg,1"], "line [123]: unexpected end of data; is a quotation mark missing"),
        (["filename,label", '"1.jpg,0', *["2.jpg,1"] * 20000], "line [0-9]+: field larger than field limit"),
        (["filename,label", f"1.jpg,{2**64}"], f"line 2: label {2**64} is above {2**63 - 1}"),
    ],
)
def test_what_is_wrong_with_a_csv_is_told_by_line(tmp_path, lines, message):
    with pytest.raises(TarError, match=f"x.csv:? {message}"):
        CsvLabels(write_list(tmp_path / "x.csv", *lines))


def test_a_file_without_a_label_is_an_error(tarball, tmp_path):
    labels = CsvLabels(write_list(tmp_path / "x.csv", "filename,label", "top.jpg,3"))
    with pytest.raises(TarError, match="x.csv has no label for 'a/1.jpg': add it, or leave the file out"):
        index_tarball(tarball, tmp_path / "out", labels=labels)
    assert not (tmp_path / "out").exists()


def test_folders_are_classes(tmp_path):
    files = {"train/dog/1.jpg": b"1", "train/cat/1.jpg": b"2", "train/dog/2.jpg": b"3"}
    write_tarball(tmp_path / "x.tar", files)
    index = index_tarball(tmp_path / "x.tar", tmp_path / "a", labels=FolderLabels())
    assert load(index.entries_path)[:, 0].tolist() == [1, 0, 1]
    assert load(index.class_ids_path).tolist() == [[0, "cat"], [1, "dog"]]
    index = index_tarball(tmp_path / "x.tar", tmp_path / "b", labels=FolderLabels(["dog", "bird", "cat"]))
    assert load(index.entries_path)[:, 0].tolist() == [0, 2, 0]
    assert load(index.class_ids_path).tolist() == [[0, "dog"], [1, "bird"], [2, "cat"]]
    with pytest.raises(TarError, match="folders that are not among the class names: cat"):
        index_tarball(tmp_path / "x.tar", tmp_path / "b", labels=FolderLabels(["dog"]))
    write_tarball(tmp_path / "x.tar", {"1.jpg": b"1"})
    with pytest.raises(TarError, match="'1.jpg' lies in no folder that could be its class"):
        index_tarball(tmp_path / "x.tar", tmp_path / "b", labels=FolderLabels())


# --- members that are no files --------------------------------------------------------------------------------------


def test_links_and_sparse_files(tmp_path):
    path = tmp_path / "x.tar"
    image = member("a.jpg", b"bytes")
    path.write_bytes(image + header("b.jpg", kind=b"1", linkname="a.jpg") + END)
    with pytest.raises(
        TarError, match="'b.jpg' is a hard link to 'a.jpg' and .* --hard-dereference, or add --skip_special"
    ):
        index_tarball(path, tmp_path)
    path.write_bytes(image + member("b.jpg", b"bytes", b"S") + END)
    with pytest.raises(TarError, match="'b.jpg' is a sparse file, whose bytes are not in one piece: pack again"):
        index_tarball(path, tmp_path)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["x.tar"]
    special = (
        header("h", kind=b"1", linkname="a.jpg") + header("l", kind=b"2", linkname="a.jpg") + header("m", kind=b"2")
    )
    path.write_bytes(special + image + header("p", kind=b"6") + END)
    index = index_tarball(path, tmp_path, skip_special=True)
    assert index.notes == [
        "left out: 1 hard link(s): h",
        "left out: 2 symbolic link(s): l, m",
        "left out: 1 fifo(s): p",
    ]
    assert load(index.names_path).item() == {0: "a.jpg"}


def test_tarballs_without_files_or_without_an_end(tmp_path):
    write_tarball(tmp_path / "x.tar", {"folder": None})
    with pytest.raises(TarError, match="x.tar holds no files"):
        index_tarball(tmp_path / "x.tar", tmp_path)
    (tmp_path / "x.tar").write_bytes(member("a.jpg", b"bytes"))
    notes = index_tarball(tmp_path / "x.tar", tmp_path).notes
    what = "the blocks of zeros that end an archive are missing at offset 1024, behind 'a.jpg': it may be cut off"
    assert notes == [what]


def test_entries_beyond_8_gib(tmp_path):
    path, size = tmp_path / "x.tar", 9 << 30
    with path.open("wb") as file:
        file.write(header("huge.bin", size, tar_format=tarfile.PAX_FORMAT))
        start = file.tell()
        file.seek(size, 1)
        file.write(member("a.jpg", b"bytes") + END)
    index = index_tarball(path, tmp_path)
    assert load(index.entries_path).tolist() == [
        [0, 0, start, start + size],
        [0, 1, start + size + 512, start + size + 517],
    ]


# --- files that are there -------------------------------------------------------------------------------------------


def test_another_tarball_s_index_is_not_overwritten(tarball, tmp_path):
    first = index_tarball(tarball, tmp_path)
    before = first.entries_path.read_bytes(), first.names_path.read_bytes()
    assert index_tarball(tarball, tmp_path).entries == first.entries
    write_tarball(tmp_path / "y.tar", {"y.jpg": b"1"})
    with pytest.raises(TarError, match="is the index of another tarball than .*y.tar, .*: choose another --prefix or"):
        index_tarball(tmp_path / "y.tar", tmp_path)
    assert (first.entries_path.read_bytes(), first.names_path.read_bytes()) == before
    forced = index_tarball(tmp_path / "y.tar", tmp_path, force=True)
    assert read_names(forced.names_path)[0] == "y.jpg"
    assert load(forced.entries_path).shape == (1, 4)


def test_classes_of_a_folder_are_shared_and_may_not_contradict(tarball, tmp_path):
    only = NameList(write_list(tmp_path / "only.txt", "2.jpg"))

    def index(prefix: str, label: int, name: str, force: bool = False) -> list:
        labels = CsvLabels(write_list(tmp_path / "x.csv", "filename,label,class", f"2.jpg,{label},{name}"))
        done = index_tarball(tarball, tmp_path, prefix, keep=only, labels=labels, force=force)
        return load(done.class_ids_path).tolist()

    assert index("query", 1, "dog") == [[1, "dog"]]
    assert index("test", 0, "cat") == [[1, "dog"], [0, "cat"]]
    with pytest.raises(TarError, match=r"class-ids.npy calls class 1 'dog', and the labels call it 'cow'"):
        index("more", 1, "cow")
    assert index("more", 1, "cow", force=True) == [[1, "cow"]]


def test_joined_tarballs_need_names_of_their_own(tmp_path):
    for tarballs in (["a/x.tar", "b/x.tar"], ["pretrain.tar", "b.tar"]):
        with pytest.raises(TarError, match="tarballs need names of their own, other than 'pretrain': "):
            join_indices(tmp_path, tarballs)

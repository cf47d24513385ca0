"""ImageNet from the official archives and from the Kaggle edition."""

from __future__ import annotations

from pathlib import Path

import pytest

from passl.data.public.imagenet import find, train_source, val_source
from passl.data.public.imagenet_labels import read_val_labels
from passl.data.public.matlab import read_variables
from passl.data.public.output import Split
from tests.public_archives import VAL_LABELS, WNIDS, ImageNet, meta_mat, tar_bytes, val_name, write_tar


def files(folder: Path) -> dict[str, bytes]:
    return {
        file.relative_to(folder).as_posix(): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()
    }


def convert(paths: list[Path], out: Path, link: str = "copy") -> dict[str, dict[str, bytes]]:
    found = find(paths)
    sources = {"train": train_source(found.train), "val": val_source(found.val, found.labels)}
    for name, source in sources.items():
        Split(out, name, {}, link=link).write(source)
    return {name: files(out / name) for name in sources}


@pytest.mark.smoke
@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("named", ["folder", "files"])
def test_the_official_archives(tmp_path, named, compressed):
    imagenet = ImageNet()
    folder = imagenet.write_archives(tmp_path / "in", compressed)
    found = convert([folder] if named == "folder" else sorted(folder.iterdir()), tmp_path / "out")
    assert found == {split: imagenet.expected(split) for split in ("train", "val")}


def test_class_archives_that_are_unpacked_once(tmp_path):
    imagenet = ImageNet()
    folder = tmp_path / "in"
    folder.mkdir()
    for wnid, images in imagenet.train.items():
        (folder / f"{wnid}.tar").write_bytes(tar_bytes(images))
    Split(tmp_path, "train", {}).write(train_source(find([folder]).train))
    assert files(tmp_path / "train") == imagenet.expected("train")


@pytest.mark.parametrize("link", ["copy", "hard", "symbolic"])
def test_the_kaggle_edition(tmp_path, link):
    imagenet = ImageNet()
    folder = imagenet.write_kaggle(tmp_path / "in")
    before = files(folder)
    assert convert([folder], tmp_path / "out", link) == {split: imagenet.expected(split) for split in ("train", "val")}
    name = next(iter(imagenet.expected("train")))
    source, written = folder / "ILSVRC/Data/CLS-LOC/train" / name, tmp_path / "out/train" / name
    assert (written.is_symlink(), written.samefile(source)) == (link == "symbolic", link != "copy")
    assert files(folder) == before


@pytest.mark.parametrize("root", ["ILSVRC", "ILSVRC/Data/CLS-LOC"])
def test_folders_inside_the_kaggle_edition(tmp_path, root):
    folder = ImageNet().write_kaggle(tmp_path)
    places = folder / "ILSVRC/Data/CLS-LOC"
    assert find([folder / root]) == (places / "train", places / "val", folder / "LOC_val_solution.csv")
    assert find([places / "val", places / "train"]) == find([folder])


@pytest.mark.parametrize("of", ["kit archive", "kit folder", "truth", "csv", "ids", "names and ids"])
def test_every_source_of_validation_labels(tmp_path, of):
    imagenet = ImageNet()
    kit = tmp_path / "kit" / "data"
    kit.mkdir(parents=True)
    for name, content in imagenet.kit().items():
        (kit / name).write_bytes(content)
    ids = [WNIDS[label] for label in VAL_LABELS]
    (tmp_path / "ids.txt").write_text("\n".join(ids))
    lines = [f"{val_name(number)} {wnid}" for number, wnid in enumerate(ids, start=1)]
    (tmp_path / "names.txt").write_text("\n".join(reversed(lines)))
    imagenet.write_archives(tmp_path)
    imagenet.write_kaggle(tmp_path)
    labels = read_val_labels(
        {
            "kit archive": tmp_path / "ILSVRC2012_devkit_t12.tar.gz",
            "kit folder": tmp_path / "kit",
            "truth": kit / "ILSVRC2012_validation_ground_truth.txt",
            "csv": tmp_path / "LOC_val_solution.csv",
            "ids": tmp_path / "ids.txt",
            "names and ids": tmp_path / "names.txt",
        }[of]
    )
    assert [labels.of(val_name(number)) for number in range(1, 5)] == ids
    with pytest.raises(ValueError, match="has no class for ILSVRC2012_val_00000005.JPEG"):
        labels.of(val_name(5))


# --- what is refused ---


@pytest.mark.smoke
@pytest.mark.parametrize("name", ["../evil.JPEG", "/evil.JPEG", "a/../../evil.JPEG", "..", "ev\til.JPEG"])
@pytest.mark.parametrize("where", ["inside", "outside", "val"])
def test_no_archive_writes_outside_its_folder(tmp_path, name, where):
    folder = ImageNet().write_archives(tmp_path / "in")
    if where == "inside":
        hostile = {"n01440764.tar": tar_bytes({name: b"x"})}
    else:
        hostile = {name if where == "val" else name.replace(".JPEG", ".tar"): b"x"}
    write_tar(folder / f"ILSVRC2012_img_{'val' if where == 'val' else 'train'}.tar", hostile)
    with pytest.raises(ValueError, match="refused"):
        convert([folder], tmp_path / "out")
    assert not [path for path in tmp_path.rglob("*") if "il" in path.name and "ILSVRC" not in path.name]
    assert not (tmp_path / "out" / ("val" if where == "val" else "train")).exists()


def test_links_in_archives_are_refused(tmp_path):
    import tarfile

    with tarfile.open(tmp_path / "ILSVRC2012_img_train.tar", "w") as tar:
        member = tarfile.TarInfo("n01440764.tar")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(member)
    with pytest.raises(ValueError, match=r"'n01440764.tar' is a symbolic link: refused"):
        train_source(tmp_path / "ILSVRC2012_img_train.tar")


def test_archives_that_are_cut_off_are_named(tmp_path):
    folder = ImageNet().write_archives(tmp_path / "in")
    train, val = folder / "ILSVRC2012_img_train.tar", folder / "ILSVRC2012_img_val.tar"
    whole = {path: path.read_bytes() for path in (train, val)}
    for path, content in whole.items():
        # in the middle of a file, and in the zeros at the end
        end = len(content.rstrip(b"\0"))
        for size in (len(content) // 2, end // 512 * 512 + 512):
            path.write_bytes(content[:size])
            with pytest.raises(ValueError, match=f"{path.name}.*: cut off"):
                convert([folder], tmp_path / f"out{path.name}{size}")
        path.write_bytes(content)


def test_a_class_archive_that_is_cut_off_is_named(tmp_path):
    inner = tar_bytes(ImageNet().train[WNIDS[1]])
    path = write_tar(
        tmp_path / "ILSVRC2012_img_train.tar",
        {f"{WNIDS[0]}.tar": tar_bytes({"a.JPEG": b"x"}), f"{WNIDS[1]}.tar": inner[:700]},
    )
    with pytest.raises(ValueError, match=f"ILSVRC2012_img_train.tar: {WNIDS[1]}.tar: cut off: .* ends at 700"):
        Split(tmp_path, "train", {}).write(train_source(path))
    assert files(tmp_path / "train.partial") == {f"{WNIDS[0]}/a.JPEG": b"x"}


def test_other_files_are_recognised(tmp_path):
    text = write_tar(tmp_path / "notes.tar", {"readme.md": b"x"})
    test = write_tar(tmp_path / "ILSVRC2012_img_test.tar", {"ILSVRC2012_test_00000001.JPEG": b"x"})
    for path in (text, test):
        with pytest.raises(ValueError, match="it is neither ILSVRC2012_img_train.tar"):
            find([path])
    with pytest.raises(ValueError, match="is compressed"):
        find([write_tar(tmp_path / "train.tar.bz2", {"n01440764.tar": b""}, "w:bz2")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="nothing of ImageNet is in"):
        find([tmp_path / "empty"])


def test_validation_images_need_their_classes(tmp_path):
    ImageNet().write_archives(tmp_path)
    (tmp_path / "ILSVRC2012_devkit_t12.tar.gz").unlink()
    found = find([tmp_path])
    assert found.labels is None
    with pytest.raises(
        ValueError, match="put ILSVRC2012_devkit_t12.tar.gz .*beside it, or name one of them with --val-l"
    ):
        val_source(found.val, found.labels)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "path,label\nx,1\n", "line 1: it must name the columns ImageId and PredictionString"),
        ("a.csv", "ImageId,PredictionString\nILSVRC2012_val_00000001,cat\n", "line 2: no image, or no class"),
        ("a.txt", "n01440764\ncat\n", "line 2: 'cat' must be a class such as n01440764"),
        ("a.txt", "n01440764\nILSVRC2012_val_00000001.JPEG n01440764\n", "some lines name an image, and some do not"),
        ("a.txt", "n01440764 n01443537\n", "line 1"),
    ],
)
def test_lists_that_make_no_sense_are_named(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=f"{name}: {message}"):
        read_val_labels(tmp_path / name)


# --- MATLAB ---


def test_a_matlab_file_is_read():
    synsets = [
        {"ILSVRC2012_ID": 1, "WNID": "n00000001", "words": ""},
        {"ILSVRC2012_ID": 2, "WNID": "n00000002", "words": "é"},
    ]
    for compressed in (True, False):
        assert read_variables(meta_mat(synsets, compressed)) == {
            "synsets": [{**synset, "ILSVRC2012_ID": [synset["ILSVRC2012_ID"]]} for synset in synsets]
        }


def test_a_damaged_matlab_file_is_an_error():
    content = meta_mat([{"ILSVRC2012_ID": 1, "WNID": "n00000001"}], compressed=False)
    for damaged in (b"", b"x" * 200, *(content[:size] for size in range(128, len(content), 8))):
        if len(damaged) == 128:
            assert read_variables(damaged) == {}
            continue
        with pytest.raises(ValueError):
            read_variables(damaged)

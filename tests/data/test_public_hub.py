"""ImageNet-1k from parquet files, those of the hub and those in a folder."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional

import pytest

from passl.data.public.hub import Hub, HubError, folder_splits, hub_splits, parquet_images
from passl.data.public.output import Split
from tests.hub_server import TOKEN, hub_serving
from tests.public_archives import VAL_LABELS, WNIDS, ImageNet

FILES = {
    "README.md": b"",
    "data/test-00000-of-00028.parquet": b"not needed",
}


def parquet(rows: list[tuple[Optional[bytes], Optional[str], int]], names: Optional[list[str]] = None) -> bytes:
    """Rows of (bytes, path, label), in row groups of two, as the `datasets` library writes them."""
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    image = arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])
    schema = arrow.schema([("image", image), ("label", arrow.int64())])
    if names:
        described = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        schema = schema.with_metadata({"huggingface": json.dumps(described)})
    columns = [[{"bytes": data, "path": path} for data, path, _ in rows], [label for _, _, label in rows]]
    table = arrow.table([arrow.array(column, field.type) for column, field in zip(columns, schema)], schema)
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table, buffer, row_group_size=2)
    return buffer.getvalue()


def of_imagenet() -> dict[str, bytes]:
    """The stand-in as the hub has it: a class behind each name."""
    imagenet = ImageNet()
    train = [
        (data, f"{name[:-5]}_{wnid}.JPEG", label)
        for label, wnid in enumerate(WNIDS)
        for name, data in imagenet.train[wnid].items()
    ]
    val = [
        (data, f"{name[:-5]}_{WNIDS[label]}.JPEG", label)
        for label, (name, data) in zip(VAL_LABELS, imagenet.val.items())
    ]
    return {
        "data/train-00000-of-00002.parquet": parquet(train[:3]),
        "data/train-00001-of-00002.parquet": parquet(train[3:]),
        "data/validation-00000-of-00001.parquet": parquet(val),
    }


def written(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def put(files: dict[str, bytes], folder: Path) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def hub(monkeypatch) -> Iterator[Any]:
    pytest.importorskip("huggingface_hub")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with hub_serving({**FILES, **of_imagenet()}) as server:
        yield server


@pytest.mark.parametrize("root", [".", "data"])
def test_parquet_files_that_are_there_give_the_official_names(tmp_path, root):
    folder = put({**FILES, **of_imagenet()}, tmp_path / "in")
    imagenet = ImageNet()
    for name, split in folder_splits(folder / root).items():
        assert split.part == ""
        Split(tmp_path, name, {}).write(split)
        assert written(tmp_path / name) == imagenet.expected(name)


@pytest.mark.parametrize(
    ("paths", "names", "expected"),
    [
        (["train/n00000001/a.JPEG", "n00000002_7.JPEG"], None, ["n00000001/a.JPEG", "n00000002/n00000002_7.JPEG"]),
        ([None, None], ["cat", "big/dog"], ["cat/00000005.JPEG", "big_dog/00000006.JPEG"]),
        ([None, "x.png"], None, ["0000/00000005.JPEG", "0001/00000006.JPEG"]),
    ],
)
def test_names_of_images_that_do_not_tell_their_class(tmp_path, paths, names, expected):
    rows = [(b"\xff\xd8\xffdata", path, label) for label, path in enumerate(paths)]
    (tmp_path / "a.parquet").write_bytes(parquet(rows, names))
    found = list(parquet_images(tmp_path / "a.parquet", 5))
    assert [f"{image.class_name}/{image.name}" for image in found] == expected


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ((None, "n00000001_1.JPEG", 0), "row for image 0: there are no bytes of an image"),
        ((b"x", None, -1), "row for image 0: label -1 is that of no class"),
    ],
)
def test_rows_that_make_no_sense_are_named(tmp_path, row, message):
    (tmp_path / "a.parquet").write_bytes(parquet([row]))
    with pytest.raises(ValueError, match=message):
        list(parquet_images(tmp_path / "a.parquet", 0))


def test_damaged_parquet_files_are_named(tmp_path):
    content = parquet([(b"x" * 1000, "n00000001_1.JPEG", 0)])
    for damaged in (b"", b"<html>" * 10, content[:-20], content[:200] + content[400:]):
        (tmp_path / "a.parquet").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"a.parquet: damaged, or not a parquet file"):
            list(parquet_images(tmp_path / "a.parquet", 0))


def test_some_of_the_files_are_a_part(tmp_path):
    files = of_imagenet()
    del files["data/train-00000-of-00002.parquet"]
    splits = folder_splits(put(files, tmp_path))
    assert {name: split.part for name, split in splits.items()} == {"train": "1 of 2 files", "val": ""}
    with pytest.raises(FileNotFoundError, match="has no parquet files such as train-00000-of-00294.parquet"):
        folder_splits(put({"data/a.parquet": b""}, tmp_path / "other"))


def test_from_the_hub_with_a_token(tmp_path, hub):
    imagenet = ImageNet()
    splits = hub_splits(Hub(tmp_path / "in", TOKEN, hub.address), keep=False)
    for name, split in splits.items():
        Split(tmp_path / "out", name, {}).write(split)
        assert written(tmp_path / "out" / name) == imagenet.expected(name)
    assert hub.downloaded == sorted(of_imagenet())
    assert not list((tmp_path / "in").rglob("*.parquet")), "each is deleted when it is converted"


def test_an_interrupted_download_goes_on_with_the_next_file(tmp_path, hub):
    second = hub.files["data/train-00001-of-00002.parquet"]
    hub.files["data/train-00001-of-00002.parquet"] = b"x"
    splits = hub_splits(Hub(tmp_path / "in", TOKEN, hub.address), keep=True)
    with pytest.raises(ValueError, match="damaged, or not a parquet file"):
        Split(tmp_path / "out", "train", {}).write(splits["train"])
    hub.files["data/train-00001-of-00002.parquet"] = second
    splits = hub_splits(Hub(tmp_path / "in", TOKEN, hub.address), keep=True)
    Split(tmp_path / "out", "train", {}).write(splits["train"])
    assert written(tmp_path / "out" / "train") == ImageNet().expected("train")
    assert hub.downloaded.count("data/train-00000-of-00002.parquet") == 1


@pytest.mark.parametrize("status", [0, 401, 403])
def test_a_refused_token_says_what_to_do_and_is_not_shown(tmp_path, hub, status):
    hub.status = status
    token = "hf_wrong" if not status else TOKEN
    with pytest.raises(HubError) as caught:
        Split(tmp_path / "out", "val", {}).write(hub_splits(Hub(tmp_path, token, hub.address), keep=False)["val"])
    text = str(caught.value)
    assert f"the hub refuses (HTTP {status or 401})" in text
    assert "accept the licence at https://huggingface.co/datasets/ILSVRC/imagenet-1k" in text
    assert "HF_TOKEN=hf_..." in text
    assert token not in text


def test_a_hub_that_is_not_there(tmp_path, hub):
    pytest.importorskip("huggingface_hub")
    with hub_serving({}) as gone:
        address = gone.address
    with pytest.raises(HubError, match="could not be read .* passl-data imagenet-hf --from FOLDER"):
        Hub(tmp_path, TOKEN, address).files()


def test_a_token_that_is_none(tmp_path, monkeypatch):
    library = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(library, "get_token", lambda: None)
    with pytest.raises(HubError, match="only to users that are known to it. Log in there, accept the licence"):
        Hub(tmp_path)
    for token in ("hf_a b", "hf_a\nb", "“hf”"):
        with pytest.raises(HubError, match="HF_TOKEN has characters that no token has") as caught:
            Hub(tmp_path, token)
        assert token not in str(caught.value)


@pytest.mark.parametrize("name", ["huggingface_hub", "pyarrow"])
def test_a_missing_library_is_named_with_its_extra(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(HubError, match=f'{name} is not installed: pip install "passl\\[hf\\]"'):
        Hub(tmp_path, TOKEN) if name == "huggingface_hub" else list(parquet_images(tmp_path / "a.parquet", 0))

"""passl-data cifar10, cifar100, imagenet-folder, imagenet-hf: what a user types and reads."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from passl import download
from passl.cli import data_main
from passl.cli.data.public import read_dotenv
from passl.data.datasets import ImageFolder
from passl.data.public import sinks
from passl.data.tar_dataset import TarDataset
from tests.file_server import serving
from tests.public_archives import CIFAR10_NAMES, WNIDS, Cifar10, Cifar100, ImageNet, jpeg, write_tar

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path) -> None:
    """In an empty folder, without a token, and without pauses."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(download, "_PAUSE", 0.0)


def stopped(capsys, *arguments: str) -> str:
    """What a command that fails prints, which is one error and no traceback."""
    with pytest.raises(SystemExit) as caught:
        data_main(list(arguments))
    assert caught.value.code == 1
    printed = capsys.readouterr().err
    assert printed.count("error: ") == 1
    assert "Traceback" not in printed
    return printed.partition("error: ")[2]


def cifar_archive(path: Path = Path("cifar-10-python.tar.gz"), per_batch: int = 10) -> Path:
    return write_tar(path, Cifar10(per_batch).pickled(), "w:gz")


# --- CIFAR ---


@pytest.mark.smoke
def test_cifar10_goes_where_the_configuration_looks(capsys):
    cifar_archive()
    data_main(["cifar10", "--from", "cifar-10-python.tar.gz"])
    printed = capsys.readouterr().out
    assert "dataset/cifar10/train: 50 images in 10 classes\n" in printed
    assert "dataset/cifar10/test: 10 images in 10 classes\n" in printed
    assert "is not the published archive" in printed
    assert "the published data set has 50000 images in train" in printed
    config = yaml.safe_load((ROOT / "configs/dino/dino_vit_cifar10_patch4_32_pt.yaml").read_text())
    train = ImageFolder(config["DataLoader"]["Train"]["dataset"]["root"])
    test = ImageFolder(config["Evaluators"][0]["val_dataset"]["root"])
    assert train.class_names == test.class_names == CIFAR10_NAMES
    expected = Cifar10(10).expected("train")
    for index, path in enumerate(train.paths):
        np.testing.assert_array_equal(train.load(index), expected[path.partition("/train/")[2]])
    data_main(["cifar10"])
    assert "dataset/cifar10/train: 50 images in 10 classes, complete already\n" in capsys.readouterr().out


def test_superclasses_of_cifar100(capsys):
    write_tar(Path("a.tar.gz"), Cifar100().pickled(), "w:gz")
    data_main(["cifar100", "--from", "a.tar.gz", "--out", "fine"])
    data_main(["cifar100", "--from", "a.tar.gz", "--out", "coarse", "--coarse"])
    assert sorted(path.name for path in Path("fine/train").iterdir() if path.is_dir()) == Cifar100().fine_names
    assert sorted(path.name for path in Path("coarse/train").iterdir() if path.is_dir()) == Cifar100().coarse_names
    assert "labels fine" in stopped(capsys, "cifar100", "--out", "fine", "--coarse")


def test_tarballs_share_the_numbers_of_classes(capsys):
    for split, names in (("train", ("cat", "dog")), ("test", ("dog",))):
        for name in names:
            Path("in", split, name).mkdir(parents=True)
            Path("in", split, name, f"{split}.png").write_bytes(f"{split} {name}".encode())
    data_main(["cifar10", "--from", "in", "--tar", "--out", "out"])
    assert "{name: TarDataset, root: out, prefix: train}" in capsys.readouterr().out
    train, test = TarDataset("out", "train"), TarDataset("out", "test")
    assert train.class_names == test.class_names == ["cat", "dog"]
    assert [(train.read(index).data, train.labels[index]) for index in range(2)] == [
        (b"train cat", 0),
        (b"train dog", 1),
    ]
    assert [(test.read(index).data, test.labels[index]) for index in range(len(test))] == [(b"test dog", 1)]
    before = Path("out/train_entries.npy").stat().st_mtime_ns
    data_main(["cifar10", "--tar", "--out", "out"])
    assert Path("out/train_entries.npy").stat().st_mtime_ns == before
    Path("out/test_entries.npy").unlink()
    data_main(["cifar10", "--tar", "--out", "out"])
    assert Path("out/test_entries.npy").is_file()


@pytest.mark.smoke
def test_cifar10_is_downloaded_with_resume(server, capsys):
    archive = cifar_archive()
    server.content = archive.read_bytes()
    server.announced = len(server.content)
    server.ranges = True
    partial = Path("dataset/downloads/cifar-10-python.tar.gz.partial")
    partial.parent.mkdir(parents=True)
    partial.write_bytes(server.content[:5000])
    md5 = hashlib.md5(server.content).hexdigest()
    data_main(["cifar10", "--url", server.address("cifar-10-python.tar.gz"), "--md5", md5])
    assert server.asked == [5000]
    assert partial.with_suffix("").read_bytes() == server.content
    assert len(ImageFolder("dataset/cifar10/train")) == 50
    data_main(["cifar10"])
    assert len(server.requests) == 1


def test_another_file_than_the_published_one_is_not_converted(server, capsys):
    error = stopped(capsys, "cifar10", "--url", server.address())
    assert "the published file c58f30108f718f92721af3b95e74349a" in error
    assert not Path("dataset/cifar10").exists()


def test_without_a_network(capsys):
    with serving() as server:
        address = server.address()
    error = stopped(capsys, "cifar10", "--url", address)
    assert "Connection refused" in error
    assert error.endswith(
        "Without a network: fetch https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz (171 MB, MD5 "
        "c58f30108f718f92721af3b95e74349a) elsewhere, put it at dataset/downloads/cifar-10-python.tar.gz, and type the "
        "same command again; or: passl-data cifar10 --from FILE\n"
    )


def test_nothing_that_looks_whole_on_a_full_disk(capsys):
    """With files limited to 100 kB, as if the disk ended there."""
    cifar_archive()
    program = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); " + (
        "from passl.cli import data_main; data_main(['cifar10', '--from', 'cifar-10-python.tar.gz', '--tar'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "make room and type the same command again" in done.stderr
    assert "Traceback" not in done.stderr
    assert not [path for path in Path("dataset/cifar10").iterdir() if path.suffix in (".tar", ".npy")]
    data_main(["cifar10", "--from", "cifar-10-python.tar.gz", "--tar"])
    assert "train_dataset.tar: 50 images in 10 classes\n" in capsys.readouterr().out


def test_an_interrupt_says_how_to_go_on(capsys, monkeypatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    cifar_archive()
    monkeypatch.setattr("passl.data.public.cifar._png", interrupt)
    with pytest.raises(SystemExit) as caught:
        data_main(["cifar10", "--from", "cifar-10-python.tar.gz"])
    assert caught.value.code == 130
    assert "stopped; type the same command again, and it goes on" in capsys.readouterr().err


# --- ImageNet ---


@pytest.mark.smoke
def test_imagenet_folder(capsys):
    imagenet = ImageNet()
    imagenet.write_archives(Path("in"))
    data_main(["imagenet-folder", "--from", "in"])
    printed = capsys.readouterr().out
    assert "dataset/ILSVRC2012/train: 7 images in 3 classes\n" in printed
    assert "dataset/ILSVRC2012/val: 4 images in 3 classes\n" in printed
    assert ImageFolder("dataset/ILSVRC2012/val").class_names == WNIDS
    data_main(["imagenet-folder"])
    assert "val: 4 images in 3 classes, complete already\n" in capsys.readouterr().out


def test_imagenet_in_its_usual_place_as_tarballs(capsys):
    imagenet = ImageNet()
    imagenet.write_archives(Path("dataset/downloads"))
    data_main(["imagenet-folder", "--tar", "--out", "out"])
    for split in ("train", "val"):
        images = TarDataset("out", split)
        assert images.class_names == WNIDS
        assert [images.read(index).data for index in range(len(images))] == list(imagenet.expected(split).values())


def test_one_split_and_named_labels(capsys):
    imagenet = ImageNet()
    imagenet.write_archives(Path("in"))
    imagenet.write_kaggle(Path("kaggle"))
    data_main(["imagenet-folder", "--from", "in/ILSVRC2012_img_val.tar", "--val-labels", "kaggle/LOC_val_solution.csv"])
    printed = capsys.readouterr().out
    assert "val: 4 images in 3 classes\n" in printed
    assert "note: there was nothing of train: it is not written\n" in printed
    data_main(["imagenet-folder", "--from", "kaggle", "--split", "train"])
    assert "train: 7 images in 3 classes\n" in capsys.readouterr().out


def test_splits_that_are_written_one_by_one_share_the_numbers_of_classes(capsys):
    """Also where a class of the one is not in the other."""
    for split, classes in (("val", WNIDS[1:]), ("train", WNIDS)):
        for name in classes:
            (Path("in") / split / name).mkdir(parents=True)
            (Path("in") / split / name / "1.JPEG").write_bytes(jpeg(1))
    for split in ("val", "train"):
        data_main(["imagenet-folder", "--from", "in", "--out", "out", "--tar", "--split", split])
        assert f"{split}_dataset.tar: " in capsys.readouterr().out
    train, val = TarDataset("out", "train"), TarDataset("out", "val")
    assert train.class_names == val.class_names == WNIDS
    assert (train.labels.tolist(), val.labels.tolist()) == ([0, 1, 2], [1, 2])


def test_links_that_cannot_be_say_what_to_do(capsys, monkeypatch):
    ImageNet().write_kaggle(Path("kaggle"))
    error = stopped(capsys, "imagenet-folder", "--from", "kaggle", "--tar", "--link", "hard")
    assert "a tarball holds the images themselves: leave out --link hard, or --tar" in error

    def other_disk(source: Path, target: Path) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link", str(source), None, str(target))

    monkeypatch.setitem(sinks.LINKS, "hard", other_disk)
    error = stopped(capsys, "imagenet-folder", "--from", "kaggle", "--link", "hard")
    assert "hard links need the same disk: --link symbolic, or copy: 'kaggle/" in error


def test_imagenet_that_is_not_there_says_what_to_put_where(capsys):
    for _ in range(2):
        error = stopped(capsys, "imagenet-folder")
        assert "put ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz into " in error
        assert "dataset/downloads, and type the same command again" in error
        assert "passl-data imagenet-folder --from FOLDER" in error
        Path("dataset/downloads").mkdir(parents=True, exist_ok=True)


def test_archives_are_verified_on_request(capsys):
    ImageNet().write_archives(Path("in"))
    error = stopped(capsys, "imagenet-folder", "--from", "in", "--verify")
    assert "in/ILSVRC2012_img_train.tar is damaged or another file: its MD5 is" in error
    assert "the published 1d675b47d978889d74fa0da5fadfb00e" in error


# --- the hub ---


def test_imagenet_hf_from_a_folder(capsys):
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    images = ImageNet().expected("val")
    rows = [{"bytes": data, "path": name.rpartition("/")[2]} for name, data in images.items()]
    rows = [{**row, "path": f"{row['path'][:-5]}_{name[:9]}.JPEG"} for row, name in zip(rows, images)]
    table = arrow.table({"image": rows, "label": list(range(len(rows)))})
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table, buffer)
    Path("in").mkdir()
    Path("in/validation-00000-of-00002.parquet").write_bytes(buffer.getvalue())
    data_main(["imagenet-hf", "--from", "in", "--split", "val"])
    printed = capsys.readouterr().out
    assert "note: there were only 1 of 2 files of val; with more of them, delete it and convert it again\n" in printed
    assert "dataset/ILSVRC2012/val: 4 images in 3 classes\n" in printed
    for name, data in images.items():
        assert Path("dataset/ILSVRC2012/val", name).read_bytes() == data
    data_main(["imagenet-hf", "--from", "in", "--split", "val"])
    assert "4 images in 3 classes, complete already\nnote: there were only 1 of 2 files" in capsys.readouterr().out


def test_the_hub_wants_a_token(capsys, monkeypatch):
    library = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(library, "get_token", lambda: None)
    error = stopped(capsys, "imagenet-hf")
    assert "make a token that may read at https://huggingface.co/settings/tokens" in error
    assert "files that are here already need none: passl-data imagenet-hf --from FOLDER" in error


def test_the_token_is_of_the_environment_or_of_dotenv(monkeypatch, capsys):
    seen = []

    class Hub:
        def __init__(self, folder: Path, token: str) -> None:
            seen.append(token)
            raise OSError("no hub here")

    monkeypatch.setattr("passl.data.public.hub.Hub", Hub)
    Path(".env").write_text("HF_TOKEN=hf_of_the_file\n")
    stopped(capsys, "imagenet-hf")
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_environment")
    stopped(capsys, "imagenet-hf")
    monkeypatch.setenv("HF_TOKEN", "")
    stopped(capsys, "imagenet-hf")
    assert seen == ["hf_of_the_file", "hf_of_the_environment", "hf_of_the_file"]


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("HF_TOKEN=hf_a", "hf_a"),
        ("  export HF_TOKEN = hf_a  ", "hf_a"),
        ("HF_TOKEN='hf_a' # mine", "hf_a"),
        ('HF_TOKEN="hf_a#b"', "hf_a#b"),
        ("HF_TOKEN=hf_a # mine", "hf_a"),
        ("HF_TOKEN=hf_a#b", "hf_a#b"),
        ("HF_TOKEN=a=b", "a=b"),
        ("HF_TOKEN=", ""),
        ("#HF_TOKEN=hf_a", None),
        ("HF_TOKEN", None),
        ("OTHER=1", None),
    ],
)
def test_dotenv(line, value):
    Path(".env").write_text(f"# a comment\n\n{line}\r\nLAST=1\n", encoding="utf-8-sig")
    values = read_dotenv(Path(".env"))
    assert values.get("HF_TOKEN") == value
    assert values["LAST"] == "1"
    assert read_dotenv(Path("nowhere")) == {}


# --- help ---


@pytest.mark.parametrize("command", ["cifar10", "cifar100", "imagenet-folder", "imagenet-hf"])
def test_help_has_examples_and_the_disk_space(command, capsys):
    with pytest.raises(SystemExit) as caught:
        data_main([command, "--help"])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert f"passl-data {command} --from " in printed
    assert "Disk: " in printed
    assert "--tar" in printed
    assert "default: dataset/" in printed

"""Batches: order, shares, identical content for any number of workers, bad files, errors, dying processes."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from passl.data.datasets import ImageFolder, ImageList
from passl.data.loader import BadSamplesError, EpochSampler, Loader
from passl.data.multi_crop import MultiCrop
from passl.data.transforms import Compose, RandomResizedCrop, ToTensor

needs_workers = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Paddle has workers on Linux only")
SMALL_VIEWS = functools.partial(MultiCrop, 16, 8, num_local_crops=3)


def indices(batches) -> list[list[int]]:
    return [[index for _, index in batch] for batch in batches]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(7):
            Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8)).save(tmp_path / name / f"{i}.png")
    return tmp_path


def batches_of(dataset, start: int = 0, stop: int = 6, num_workers: int = 0, seed: int = 3) -> list[dict]:
    loader = Loader(dataset, EpochSampler(len(dataset), 4, seed=seed), num_workers=num_workers, seed=seed)
    return [{name: np.asarray(array) for name, array in batch.items()} for batch in loader.iterate(start, stop)]


def assert_identical(first: list[dict], second: list[dict]) -> None:
    assert len(first) == len(second)
    for ours, theirs in zip(first, second):
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert ours[name].dtype == theirs[name].dtype
            assert ours[name].shape == theirs[name].shape
            assert ours[name].tobytes() == theirs[name].tobytes()


# --- the sampler ---


def test_an_epoch_is_a_seeded_permutation() -> None:
    sampler = EpochSampler(length=10, batch_size=3, seed=5)
    assert sampler.steps_per_epoch == 3
    batches = list(sampler.batches(0, 6))
    for epoch in (0, 1):
        order = np.random.default_rng([5, epoch]).permutation(10)[:9].tolist()
        samples = [sample for batch in batches[3 * epoch : 3 * epoch + 3] for sample in batch]
        assert samples == [(epoch, index) for index in order]


def test_without_shuffle_and_drop_last_the_tail_is_kept() -> None:
    sampler = EpochSampler(length=10, batch_size=4, shuffle=False, drop_last=False)
    assert indices(sampler.batches(0, sampler.steps_per_epoch)) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


@pytest.mark.smoke
@pytest.mark.parametrize("start", [0, 1, 4, 5, 13])
def test_any_step_can_be_the_first(start: int) -> None:
    sampler = EpochSampler(length=11, batch_size=2, seed=1)
    everything = list(sampler.batches(0, 20))
    assert list(sampler.batches(start, 20)) == everything[start:]
    endless = sampler.batches(start)
    assert [next(endless) for _ in range(7)] == everything[start : start + 7]


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("drop_last", [True, False])
def test_processes_share_the_batches_that_one_process_would_have(world_size: int, drop_last: bool) -> None:
    one = EpochSampler(length=41, batch_size=4 * world_size, seed=2, drop_last=drop_last)
    many = [
        EpochSampler(41, 4, seed=2, rank=rank, world_size=world_size, drop_last=drop_last) for rank in range(world_size)
    ]
    steps = 2 * one.steps_per_epoch
    shares = zip(*(sampler.batches(0, steps) for sampler in many))
    for whole, parts in zip(one.batches(0, steps), shares):
        assert len({len(part) for part in parts}) == 1, "all processes have equally many"
        gathered = [sample for row in zip(*parts) for sample in row]
        assert gathered[: len(whole)] == whole
        assert set(gathered) == set(whole)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"length": 5, "batch_size": 6}, "5 samples do not fill one global batch of 6 x 1 process"),
        ({"length": 0, "batch_size": 6, "drop_last": False}, "0 samples do not fill .*: add images"),
        ({"length": 5, "batch_size": 0}, r"batch_size \(0\) must be at least 1"),
        ({"length": 5, "batch_size": 1, "rank": 2, "world_size": 2}, r"rank \(2\) must be .* less than"),
    ],
)
def test_bad_sampler_arguments_are_errors(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EpochSampler(**arguments)


# --- the content of batches ---


@pytest.mark.smoke
def test_multi_crop_batches_are_stacked_view_by_view(folder: Path) -> None:
    dataset = ImageFolder(folder, transform=SMALL_VIEWS())
    batch = batches_of(dataset, stop=1, seed=9)[0]
    assert batch["global_crops"].shape == (2 * 4, 3, 16, 16)
    assert batch["local_crops"].shape == (3 * 4, 3, 8, 8)
    assert batch["label"].dtype == batch["index"].dtype == np.int64
    np.testing.assert_array_equal(batch["label"], dataset.labels[batch["index"]])
    for position, index in enumerate(batch["index"]):
        sample = dataset.sample(int(index), np.random.default_rng([9, 0, int(index)]))
        np.testing.assert_array_equal(batch["global_crops"][position::4], sample["global_crops"])
        np.testing.assert_array_equal(batch["local_crops"][position::4], sample["local_crops"])


def test_batches_without_labels_have_image_and_index(folder: Path) -> None:
    dataset = ImageList(folder, transform=Compose([RandomResizedCrop([6, 5]), ToTensor()]))
    batch = batches_of(dataset, stop=1)[0]
    assert batch.keys() == {"image", "index"}
    assert batch["image"].shape == (4, 3, 6, 5)


@pytest.mark.parametrize(("seed", "epoch"), [(4, 0), (3, 1)])
def test_other_seeds_and_epochs_give_other_views(folder: Path, seed: int, epoch: int) -> None:
    dataset = ImageFolder(folder, transform=SMALL_VIEWS())
    first = dataset.sample(0, np.random.default_rng([3, 0, 0]))["global_crops"]
    assert not np.array_equal(first, dataset.sample(0, np.random.default_rng([seed, epoch, 0]))["global_crops"])


@pytest.mark.smoke
@needs_workers
@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_do_not_change_the_batches(folder: Path, num_workers: int) -> None:
    (folder / "a" / "broken.png").touch()
    dataset = ImageFolder(folder, transform=SMALL_VIEWS())
    reference = batches_of(dataset, stop=8)
    assert_identical(batches_of(dataset, stop=8, num_workers=num_workers), reference)
    assert_identical(batches_of(dataset, start=5, stop=8, num_workers=num_workers), reference[5:])


@needs_workers
def test_an_iterator_can_be_left_early_and_another_one_started(folder: Path) -> None:
    loader = Loader(ImageFolder(folder, transform=SMALL_VIEWS()), EpochSampler(14, 4), num_workers=2)
    for _ in range(3):
        iterator = loader.iterate()
        next(iterator)
        iterator.close()
    assert len(list(loader.iterate(0, 2))) == 2


@needs_workers
def test_loaders_that_failed_do_not_make_later_workers_hang(folder: Path) -> None:
    """The remains of a loader used to be collected in the forks of the next one, and waited for lost threads."""
    dataset = ImageFolder(folder, transform=functools.partial(_fail, error=KeyError("a bug")))
    for _ in range(10):
        with pytest.raises(KeyError):
            batches_of(dataset, num_workers=2)


# --- files that cannot be read ---


@pytest.mark.smoke
@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=needs_workers)])
def test_bad_files_are_replaced_named_and_counted_once(folder: Path, num_workers: int, caplog) -> None:
    bad = [str(folder / "a" / "3.png"), str(folder / "b" / "0.png")]
    for path in bad:
        Path(path).write_bytes(b"")
    dataset = ImageFolder(folder, transform=SMALL_VIEWS(), max_bad_samples=2)
    loader = Loader(dataset, EpochSampler(len(dataset), 7), num_workers=num_workers)
    batches = [{k: np.asarray(v) for k, v in batch.items()} for batch in loader.iterate(0, 6)]
    assert sorted(loader.bad_samples) == [(path, "the file is empty (0 bytes)") for path in bad]
    assert all(len(batch["index"]) == 7 for batch in batches)
    bad_indices = [dataset.paths.index(path) for path in bad]
    for batch in batches:
        assert not set(batch["index"]) & set(bad_indices), "`index` is that of the sample in the batch"
        np.testing.assert_array_equal(batch["label"], dataset.labels[batch["index"]])
    messages = [record.message for record in caplog.records if record.name == "passl"]
    assert len(messages) == 2
    assert all(any(path in message for message in messages) for path in bad)


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=needs_workers)])
def test_too_many_bad_files_stop_the_run_with_the_list(folder: Path, num_workers: int) -> None:
    bad = [folder / "a" / f"{i}.png" for i in range(3)]
    for path in bad:
        path.write_text("not an image")
    dataset = ImageFolder(folder, transform=SMALL_VIEWS(), max_bad_samples=2)
    with pytest.raises(BadSamplesError) as error:
        batches_of(dataset, num_workers=num_workers)
    assert "more than max_bad_samples (2)" in str(error.value)
    assert len(error.value.bad_samples) == 3
    assert all(f"{path}: not an image that Pillow can identify" in str(error.value) for path in bad)


def test_a_data_set_without_any_readable_file_is_an_error(folder: Path) -> None:
    for path in folder.rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(BadSamplesError, match="all image files cannot be read") as error:
        batches_of(ImageFolder(folder, max_bad_samples=100))
    assert len(error.value.bad_samples) == 14


# --- errors and dying processes ---


class UnpicklableError(Exception):
    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)


def _fail(image: Image.Image, rng: np.random.Generator, error: Exception) -> np.ndarray:
    if rng.random() < 0.2:
        raise error
    return np.zeros((3, 4, 4), np.float32)


@pytest.mark.smoke
@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=needs_workers)])
def test_an_exception_arrives_as_itself_and_names_the_sample(folder: Path, num_workers: int) -> None:
    dataset = ImageFolder(folder, transform=functools.partial(_fail, error=KeyError("a bug")))
    with pytest.raises(KeyError, match="a bug") as error:
        batches_of(dataset, num_workers=num_workers)
    assert "while loading sample" in str(error.value.__cause__)
    assert str(folder) in str(error.value.__cause__)


@needs_workers
def test_an_exception_that_cannot_be_pickled_still_arrives(folder: Path) -> None:
    dataset = ImageFolder(folder, transform=functools.partial(_fail, error=UnpicklableError(1, "odd")))
    with pytest.raises(RuntimeError, match="UnpicklableError: odd"):
        batches_of(dataset, num_workers=1)


def test_images_of_different_sizes_are_an_error_that_says_what_to_do(folder: Path) -> None:
    Image.new("RGB", (50, 50)).save(folder / "a" / "large.png")
    with pytest.raises(ValueError, match="'image' differs in shape .* CenterCrop"):
        batches_of(ImageFolder(folder, transform=ToTensor()))


def _kill_own_process(image: Image.Image, rng: np.random.Generator) -> np.ndarray:
    time.sleep(0.5)  # The main process is waiting for the batch by then.
    os.kill(os.getpid(), signal.SIGKILL)
    return np.zeros(1)


@needs_workers
def test_a_killed_worker_is_an_error_and_not_a_hang(folder: Path) -> None:
    loader = Loader(ImageFolder(folder, transform=_kill_own_process), EpochSampler(14, 4), num_workers=1)
    with pytest.raises((RuntimeError, SystemError), match="ended unexpectedly|killed"):
        next(loader.iterate())


@needs_workers
@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGTERM])
def test_workers_die_with_the_main_process(folder: Path, signal_number: int) -> None:
    script = """
        import os, subprocess, sys, time
        from passl.data.datasets import ImageFolder
        from passl.data.loader import EpochSampler, Loader
        from passl.data.multi_crop import MultiCrop
        dataset = ImageFolder(sys.argv[1], transform=MultiCrop(16, 8))
        for step, batch in enumerate(Loader(dataset, EpochSampler(len(dataset), 4), num_workers=2).iterate()):
            if step == 2:
                print(*open(f"/proc/self/task/{os.getpid()}/children").read().split(), flush=True)
            time.sleep(0.01)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        workers = [int(pid) for pid in process.stdout.readline().split()]
        process.send_signal(signal_number)
    assert len(workers) == 2
    deadline = time.monotonic() + 20
    while any(_is_running(pid) for pid in workers):
        assert time.monotonic() < deadline, "the workers survive the main process"
        time.sleep(0.1)


def _is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"

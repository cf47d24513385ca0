"""Batches: identical content for any number of workers, bad files, errors, dying processes."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from passl.data.datasets import ImageFolder, ImageList
from passl.data.loader import BadSamplesError, EpochSampler, Loader
from passl.data.multi_crop import MultiCrop
from passl.data.transforms import Compose, RandomResizedCrop, ToTensor
from passl.data.workers import WorkerDiedError

needs_workers = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Paddle has workers on Linux only")
SMALL_VIEWS = functools.partial(MultiCrop, 16, 8, num_local_crops=3)


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


def _end_at(image: Image.Image, rng: np.random.Generator, end: Callable[[], None], waiting: bool) -> dict:
    if image.getpixel((0, 0)) == (250, 0, 0):
        if waiting:
            time.sleep(0.5)  # The main process is waiting for the batch by then.
        end()
    # As large as a pipe, so that without shared memory half a message may be left in it.
    return {"image": np.zeros((3, 100, 100), np.float32)}


def _use_up(batches: Iterator[dict], pause: float) -> None:
    for _ in batches:
        time.sleep(pause)


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _leave() -> None:
    os._exit(7)


@needs_workers
@pytest.mark.parametrize("use_shared_memory", [True, False])
@pytest.mark.parametrize("waiting", [True, False])
@pytest.mark.parametrize(
    ("end", "text"), [(_kill, "was killed by signal 9 (SIGKILL)"), (_leave, "ended by itself with exit code 7")]
)
def test_a_worker_that_dies_is_an_error_that_names_its_sample(
    folder: Path, use_shared_memory: bool, waiting: bool, end: Callable[[], None], text: str
) -> None:
    Image.new("RGB", (8, 8), (250, 0, 0)).save(folder / "b" / "3.png")
    transform = functools.partial(_end_at, end=end, waiting=waiting)
    sampler = EpochSampler(14, 2, shuffle=False)
    loader = Loader(ImageFolder(folder, transform), sampler, num_workers=2, use_shared_memory=use_shared_memory)
    started = time.monotonic()
    with pytest.raises(WorkerDiedError) as error:
        _use_up(loader.iterate(), pause=0 if waiting else 0.2)
    assert text in str(error.value)
    assert f"while loading sample 10 ({folder / 'b' / '3.png'}) in epoch 0" in str(error.value)
    assert time.monotonic() - started < 30, "it was noticed by a time limit only"


@pytest.mark.smoke
@needs_workers
def test_workers_stay_over_the_epochs(folder: Path) -> None:
    dataset = ImageFolder(folder, transform=lambda image, rng: {"pid": np.int64(os.getpid())})
    loader = Loader(dataset, EpochSampler(14, 7), num_workers=2)
    pids = [np.asarray(batch["pid"]) for batch in loader.iterate(0, 5 * loader.steps_per_epoch)]
    assert len(pids) == 10
    assert len(set(np.concatenate(pids).tolist()) - {os.getpid()}) == 2


ONE_THREAD = """
    import sys, time
    import numpy as np
    from passl.data.datasets import ImageFolder
    from passl.data.loader import EpochSampler, Loader

    def work(image, rng):
        matrix = np.ones((700, 700), np.float32)
        try:
            import cv2
        except ModuleNotFoundError:
            threads = 1
        else:
            threads = cv2.getNumThreads()
        before = time.process_time(), time.thread_time()
        for _ in range(5):
            matrix = matrix @ matrix / 700
        process, thread = (now - then for now, then in zip((time.process_time(), time.thread_time()), before))
        return {"share": np.float64(thread / process), "opencv": np.int64(threads)}

    if __name__ == "__main__":
        dataset = ImageFolder(sys.argv[1], transform=work)
        np.ones((700, 700), np.float32) @ np.ones((700, 700), np.float32)  # starts the threads of this process
        batches = Loader(dataset, EpochSampler(len(dataset), 4), num_workers=1).iterate(0, 3)
        rows = [(float(min(b["share"].numpy())), int(max(b["opencv"].numpy()))) for b in batches]
        # At first a thread of OpenBLAS spins, which has nothing to do, and OpenCV is imported meanwhile.
        print(*rows[-1])
"""


@needs_workers
def test_a_worker_computes_in_one_thread(folder: Path) -> None:
    environment = {**os.environ, **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "2")}
    command = [sys.executable, "-c", textwrap.dedent(ONE_THREAD), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    share, threads_of_opencv = map(float, done.stdout.split())
    assert share > 0.8, "other threads of the worker computed too"
    assert threads_of_opencv == 1


# --- shared memory ---


def shared_files(pids: list[int]) -> list[str]:
    return [name for name in os.listdir("/dev/shm") if any(name.startswith(f"paddle_{pid}_") for pid in pids)]


@needs_workers
@pytest.mark.parametrize("prefetch_factor", [1, 3])
def test_shared_memory_is_bounded_and_given_back(folder: Path, prefetch_factor: int) -> None:
    num_workers = 2
    dataset = ImageFolder(folder, transform=lambda image, rng: {"image": np.full((3, 50, 50), os.getpid())})
    loader = Loader(dataset, EpochSampler(14, 2), num_workers=num_workers, prefetch_factor=prefetch_factor)
    arrays_of_a_batch = 3  # image, index, label
    most, pids = 0, set()
    for batch in loader.iterate(0, 60):
        pids.add(int(np.asarray(batch["image"]).flat[0]))
        time.sleep(0.01)  # time to run ahead, for those that may
        most = max(most, len(shared_files(sorted(pids))))
    del batch
    assert len(pids) == num_workers
    assert 0 < most <= arrays_of_a_batch * (num_workers * prefetch_factor + num_workers + 2)
    assert shared_files(sorted(pids)) == []


ENDS = {
    "SIGKILL": "os.kill(os.getpid(), signal.SIGKILL)",
    "SIGTERM": "os.kill(os.getpid(), signal.SIGTERM)",
    "exception": "raise KeyError('a bug')",
    "break": "break",
    "killed worker": "os.kill(pids[0], signal.SIGKILL)",
    "close": "batches.close(); break",
}


@needs_workers
@pytest.mark.parametrize("use_shared_memory", [True, False])
@pytest.mark.parametrize("end", ENDS)
def test_nothing_outlives_the_main_process(folder: Path, end: str, use_shared_memory: bool) -> None:
    script = f"""
        import os, signal, sys, time
        import numpy as np
        from passl.data.datasets import ImageFolder
        from passl.data.loader import EpochSampler, Loader
        def views(image, rng):
            return {{"global_crops": np.zeros((2, 3, 90, 90), np.float32), "local_crops": np.zeros((4, 3, 9, 9))}}
        dataset = ImageFolder(sys.argv[1], transform=views)
        loader = Loader(dataset, EpochSampler(len(dataset), 4), num_workers=2, use_shared_memory={use_shared_memory})
        batches = loader.iterate()
        for step, batch in enumerate(batches):
            if step == 5:
                pids = [int(pid) for pid in open(f"/proc/self/task/{{os.getpid()}}/children").read().split()]
                print(*pids, flush=True)
                {ENDS[end]}
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    workers = [int(pid) for pid in done.stdout.partition("\n")[0].split()]
    assert len(workers) == 2, done.stderr
    deadline = time.monotonic() + 20
    while any(_is_running(pid) for pid in workers):
        assert time.monotonic() < deadline, "the workers survive the main process"
        time.sleep(0.1)
    assert shared_files(workers) == []
    assert "SystemError" not in done.stderr, "Paddle's message hides what happened"


def _is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"

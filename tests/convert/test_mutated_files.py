"""Recorded files with flipped bits or a missing end: each ends in the clear error, or loads."""

from __future__ import annotations

import contextlib
import pickletools
import time
import zipfile
from typing import Any

import numpy as np
import pytest

from passl.convert import CheckpointFormatError, load_torch
from tests.convert.test_torch_files import leaves, load_and_measure

pytestmark = pytest.mark.smoke

MUTATED = (
    "loader_edge.pth",
    "loader_edge_legacy.pth",
    "loader_edge_protocol4.pth",
    "full_checkpoint.pth",
    "full_checkpoint_legacy.pth",
    "full_checkpoint_asgpu.pth",
    "full_checkpoint_legacy_asgpu.pth",
    "full_bnhead_checkpoint.pth",
    "vit_p16_backbone.pth",
    "linear_backbone_fullstyle.pth",
)
SEEDS_PER_FILE = 50


def shapes(value: Any) -> dict[str, tuple[int, ...]]:
    return {path: leaf.shape for path, leaf in leaves(value).items() if isinstance(leaf, np.ndarray)}


def mutated(content: bytes, generator: np.random.Generator, protected: int) -> bytes:
    """`content` cut short, or with a few bits flipped, half of them where the format's own structures are: in the
    first tenth or the last; a byte in front of `protected` is not touched.
    """
    if generator.random() < 0.2:
        return content[: generator.integers(len(content))]
    changed = bytearray(content)
    for _ in range(generator.integers(1, 4)):
        size = len(content) - protected
        at = generator.integers(size)
        if generator.random() < 0.5:
            at = at // 10 if generator.random() < 0.5 else size - 1 - at // 10
        changed[protected + at] ^= 1 << generator.integers(8)
    return bytes(changed)


@pytest.mark.parametrize("name", MUTATED)
def test_mutated_files_end_in_the_error_or_load(reference, tmp_path, name):
    content = (reference / name).read_bytes()
    recorded = load_torch(reference / name)
    expected, values = shapes(recorded), leaves(recorded)
    has_checksums = content[:2] == b"PK"
    path = tmp_path / "w.pth"
    for seed in range(SEEDS_PER_FILE):
        generator = np.random.default_rng([seed, len(content)])
        path.write_bytes(mutated(content, generator, 0))
        started = time.perf_counter()
        try:
            found, peak = load_and_measure(path)
        except CheckpointFormatError:
            continue
        assert time.perf_counter() - started < 20, seed
        assert peak < 100 << 20, seed
        if has_checksums:
            assert shapes(found) == expected, seed
            for leaf, array in leaves(found).items():
                np.testing.assert_array_equal(array, values[leaf], str(seed))


@pytest.mark.parametrize("name", [name for name in MUTATED if "legacy" in name])
def test_mutated_numbers_of_legacy_files_leave_the_shapes(reference, tmp_path, name):
    """The format has no checksums, so that other numbers are not noticed, and other sizes only if they do not fit."""
    content = (reference / name).read_bytes()
    expected = shapes(load_torch(reference / name))
    size = sum(array.nbytes for array in leaves(load_torch(reference / name)).values() if isinstance(array, np.ndarray))
    path = tmp_path / "w.pth"
    for seed in range(SEEDS_PER_FILE):
        path.write_bytes(mutated(content, np.random.default_rng([seed, 1]), len(content) - size // 2))
        with contextlib.suppress(CheckpointFormatError):
            assert shapes(load_torch(path)) == expected, seed


@pytest.mark.parametrize("name", ["loader_edge.pth", "loader_edge_protocol4.pth"])
def test_mutated_pickles_with_new_checksums_end_in_the_error_or_load(reference, tmp_path, name):
    """What damages a file does not renew its checksums; who means harm does."""
    with zipfile.ZipFile(reference / name) as archive:
        members = {member: archive.read(member) for member in archive.namelist()}
    (pickled,) = (member for member in members if member.endswith("/data.pkl"))
    operations = [ord(operation.code) for operation in pickletools.opcodes]
    path = tmp_path / "w.pth"
    for seed in range(150):
        generator = np.random.default_rng(seed)
        changed = bytearray(members[pickled])
        for _ in range(generator.integers(1, 5)):
            at = generator.integers(len(changed))
            changed[at : at + generator.integers(3)] = bytes(
                generator.choice(operations, generator.integers(3)).tolist()
            )
        with zipfile.ZipFile(path, "w") as archive:
            for member, content in members.items():
                archive.writestr(member, bytes(changed) if member == pickled else content)
        started = time.perf_counter()
        with contextlib.suppress(CheckpointFormatError):
            assert load_and_measure(path)[1] < 100 << 20, seed
        assert time.perf_counter() - started < 20, seed

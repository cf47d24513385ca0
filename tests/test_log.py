"""What a run writes about itself."""

from __future__ import annotations

import resource
import signal

import pytest

from passl.log import MetricsFile, read_metrics


def test_a_full_disk_leaves_no_half_lines(tmp_path):
    """A half one would run into the next, and both would be lost."""
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path)
    metrics.write(1, {"loss": 1.0})
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, before[1][1]))
        for _ in range(2):
            with pytest.raises(OSError, match=r"No space left|File too large"):
                metrics.write(2, {"loss": 2.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before[1])
        signal.signal(signal.SIGXFSZ, before[0])
    metrics.write(3, {"loss": 3.0})
    assert [row["step"] for row in read_metrics(path)] == [1, 3]

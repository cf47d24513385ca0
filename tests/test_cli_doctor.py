"""``passl-doctor`` as a user types it."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engine import tiny

DOCTOR = "from passl.cli import doctor_main; doctor_main()"


def doctor(*arguments: object) -> subprocess.CompletedProcess:
    return tiny.run(DOCTOR, *map(str, arguments))


def write_log(folder: Path, losses: list[float]) -> Path:
    file = folder / "log.txt"
    rows = [{"train_loss": x, "train_lr": 1e-4, "train_wd": 0.04, "epoch": n} for n, x in enumerate(losses)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.smoke
def test_verdict_curves_and_exit_codes(tmp_path) -> None:
    file = write_log(tmp_path, [math.log(65536)] * 5)
    done = doctor(file, "--out", tmp_path / "report")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{file}: uniform collapse\n")
    assert "ln 65536 is 11.0904" in done.stdout
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == ["doctor.html", "doctor.png"]
    assert doctor(file, "--no-curves", "--exit-code").returncode == 3
    assert not (tmp_path / "doctor.png").exists()
    healthy = doctor(write_log(tmp_path, [11.0, 9.0, 7.0, 5.0]), "--exit-code")
    assert healthy.returncode == 0, healthy.stderr
    assert ": healthy\n" in healthy.stdout
    assert (tmp_path / "doctor.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nowhere"], 1, "error: nowhere: no such file or folder"),
        (["."], 1, "holds no metrics.jsonl"),
        (["log.txt", "--out-dim", "1"], 2, "'1' must be a whole number of at least 2"),
        (["log.txt", "--out-dim", "many"], 2, "'many' must be"),
        (["empty.txt"], 1, "error: empty.txt: empty"),
        (["log.txt", "--out", "empty.txt/x"], 1, "error: --out empty.txt/x: curves not written (Not a directory)"),
        ([], 2, "RUN"),
    ],
)
def test_errors(tmp_path, arguments, code, message) -> None:
    write_log(tmp_path, [9.0, 8.0])
    if "." in arguments:
        (tmp_path / "log.txt").unlink()
    (tmp_path / "empty.txt").touch()
    done = tiny.run(DOCTOR, *arguments, cwd=tmp_path)
    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_it_needs_no_paddle(tmp_path) -> None:
    file = write_log(tmp_path, [11.0, 9.0, 7.0])
    code = f"import sys; sys.argv[1:] = [{str(file)!r}]; {DOCTOR}; assert 'paddle' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], env=tiny.process_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

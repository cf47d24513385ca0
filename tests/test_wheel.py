"""The wheel that the tree builds works where there is no tree."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

import passl

ROOT = Path(__file__).parent.parent


def run(*command: object, cwd: Path) -> subprocess.CompletedProcess:
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from a copy of what it is made of: building writes into the source folder."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("passl", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    options = ("--no-deps", "--no-build-isolation", "--no-cache-dir", "--wheel-dir", "dist")
    run(sys.executable, "-m", "pip", "wheel", *options, ".", cwd=source)
    (built,) = (source / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> SimpleNamespace:
    """A new environment with the wheel, which borrows all else from this one, and an empty folder."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / "bin" / "python"
    (site_packages,) = (folder / "venv" / "lib").glob("python*/site-packages")
    borrowed = {sysconfig.get_paths()[kind] for kind in ("purelib", "platlib")}
    (site_packages / "borrowed.pth").write_text("\n".join(borrowed))
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--no-deps",
        "--no-index",
        wheel,
        cwd=folder,
    )
    empty = folder / "empty"
    empty.mkdir()
    return SimpleNamespace(bin=python.parent, empty=empty, site_packages=site_packages)


def test_the_wheel_holds_the_package_the_recipes_and_the_licence(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert wheel.name == f"passl-{passl.__version__}-py3-none-any.whl"
    data = f"passl-{passl.__version__}.data/data/share/passl"
    files = [file.relative_to(ROOT).as_posix() for file in (ROOT / "passl").rglob("*.py")]
    recipes = [file.relative_to(ROOT).as_posix() for file in (ROOT / "configs").rglob("*.yaml")]
    assert set(files) | {f"{data}/{recipe}" for recipe in recipes} <= names
    assert any(name.endswith("/LICENSE") for name in names)
    assert not any(name.startswith("tests/") for name in names)


@pytest.mark.parametrize("command", ["passl-train", "passl-eval", "passl-data"])
def test_an_installed_command_answers_help_without_importing_paddle(installed, command):
    python, script = installed.bin / "python", installed.bin / command
    done = run(python, "-X", "importtime", script, "--help", cwd=installed.empty)
    assert command in done.stdout
    imported = set(re.findall(r"\|\s+(\w+)(?:\.\S+)?$", done.stderr, re.MULTILINE))
    assert "passl" in imported
    assert not {"paddle", "numpy", "matplotlib"} & imported


def test_the_installed_package_is_not_the_tree(installed):
    program = "import passl; print(passl.__version__, passl.__file__)"
    version, file = run(installed.bin / "python", "-c", program, cwd=installed.empty).stdout.split()
    assert version == passl.__version__
    assert Path(file).resolve().is_relative_to(installed.site_packages.resolve())

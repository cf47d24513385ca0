"""What SECURITY.md promises and only the source shows: what executes data, and the only files that may use it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.test_layers import used

ROOT = Path(__file__).parents[1]

OWNERS = {
    **dict.fromkeys(("eval", "exec", "compile", "__import__", "builtins.eval", "builtins.exec"), ()),
    **dict.fromkeys(("os.system", "os.popen", "os.spawnl", "os.spawnv", "os.posix_spawn"), ()),
    **dict.fromkeys((f"os.exec{kind}" for kind in ("l", "le", "lp", "lpe", "v", "ve", "vp", "vpe")), ()),
    **dict.fromkeys(("marshal", "shelve", "joblib", "dill", "cloudpickle", "cPickle", "_pickle", "imp", "runpy"), ()),
    **dict.fromkeys(("pickle.load", "pickle.Unpickler", "paddle.load", "paddle.jit.load", "pandas"), ()),
    **dict.fromkeys(("yaml.unsafe_load", "yaml.full_load", "yaml.UnsafeLoader", "yaml.Loader", "yaml.FullLoader"), ()),
    **dict.fromkeys(("shutil.unpack_archive", "tempfile.mktemp", "urllib.request.urlretrieve"), ()),
    **dict.fromkeys(("ssl", "requests", "urllib.request.urlopen"), ()),
    "pickle.loads": ("passl/data/workers.py",),  # what this process's own workers send it
    "pickle._Unpickler": ("passl/formats/paddle_reader.py",),  # restricted: tests below and in test_checkpoint.py
    "torch.load": ("passl/convert/torch_side.py",),  # for --verify; with weights_only
    "urllib.request": ("passl/download.py",),
    "importlib.import_module": (
        "passl/engine/plugins.py",  # Global.plugins, which names code of the user's
        # Names that stand in the source.
        "passl/exported.py", "passl/data/public/hub.py", "passl/convert/__init__.py",
    ),
    "importlib.util": ("passl/engine/plugins.py",),
    "subprocess": ("tools/demo.py",),
}  # fmt: skip
# Calls that need an argument: (name of the function, argument, its value).
NEEDED = (
    ("numpy.load", "allow_pickle", False),
    ("numpy.save", "allow_pickle", None),  # anything but True
    ("numpy.lib.format.read_array", "allow_pickle", False),
    ("torch.load", "weights_only", True),
)


def violations(path: str, source: str) -> list[str]:
    tree = ast.parse(source)
    found = [
        f"{path}:{line}: {name}"
        for name, line in used(tree, path)
        for root, owners in OWNERS.items()
        if (name == root or name.startswith(f"{root}.")) and path not in owners
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            found += [f"{path}:{node.lineno}: {problem}" for problem in bad_call(node, tree)]
    return found


def bad_call(node: ast.Call, tree: ast.Module) -> list[str]:
    name = ast.unparse(node.func).replace("np.", "numpy.")
    arguments = {word.arg: word.value for word in node.keywords}
    found = []
    shell = arguments.get("shell")
    if shell is not None and not (isinstance(shell, ast.Constant) and shell.value is False):
        found.append("shell=")
    for function, argument, value in NEEDED:
        if name == function:
            given = arguments.get(argument)
            given = given.value if isinstance(given, ast.Constant) else given
            if given is True if value is None else given is not value:
                found.append(f"{name} without {argument}={value}")
    if name.endswith((".extractall", ".extract")) and (
        "tar" in name.lower() or "zip" in name.lower() or "arch" in name
    ):
        found.append(name)
    if name == "yaml.load" and (len(node.args) < 2 or ast.unparse(node.args[1]) not in safe_loaders(tree)):
        found.append("yaml.load without a safe loader")
    return found


def safe_loaders(tree: ast.Module) -> set[str]:
    classes = (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef))
    derived = {node.name for node in classes if "yaml.SafeLoader" in map(ast.unparse, node.bases)}
    return {"yaml.SafeLoader", "yaml.CSafeLoader", *derived}


@pytest.mark.smoke
def test_nothing_in_the_source_executes_data():
    files = [*sorted((ROOT / "passl").rglob("*.py")), *sorted((ROOT / "tools").glob("*.py")), ROOT / "hubconf.py"]
    assert len(files) > 100
    found = [
        problem for file in files for problem in violations(file.relative_to(ROOT).as_posix(), file.read_text("utf-8"))
    ]
    assert not found, "\n".join(["", *found])


@pytest.mark.parametrize(
    "source",
    [
        "eval('1')", "exec(x)", "compile(x, 'y', 'exec')", "import os\nos.system('x')", "from os import system",
        "import pickle\npickle.load(f)", "from pickle import loads", "import pickle as p\np.Unpickler(f)",
        "import paddle\npaddle.load('x')", "import numpy as np\nnp.load('x')", "np.load('x', allow_pickle=True)",
        "np.load('x', allow_pickle=flag)", "import yaml\nyaml.load(x)", "yaml.load(x, yaml.Loader)",
        "import yaml\nyaml.unsafe_load(x)", "import subprocess", "f(shell=True)", "f(shell=x)", "import shelve",
        "with tarfile.open(x) as tar:\n    tar.extractall(y)", "zipfile.ZipFile(x).extract(y)", "import urllib.request",
        "import importlib\nimportlib.import_module(x)", "__import__(x)", "import torch\ntorch.load(x)", "import ssl",
        "import shutil\nshutil.unpack_archive(x)", "import tempfile\ntempfile.mktemp()",
    ],
)  # fmt: skip
def test_what_executes_is_found(source):
    assert violations("passl/engine/build.py", source)

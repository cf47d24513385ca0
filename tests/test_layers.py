"""The rules of the house that only the source shows: who may import whom, who owns which outside thing."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Optional

import pytest

pytestmark = pytest.mark.smoke

PASSL = Path(__file__).parent.parent / "passl"

# Imports go down only; the modules of the ground floor may use each other.
FLOORS = (
    (
        "__init__",
        "registry",
        "yaml_io",
        "schema",
        "config",
        "schedules",
        "distributed",
        "download",
        "log",
        "page",
        "processes",
        "formats",
        "cubic",
    ),
    ("data", "models"),
    ("checkpoint", "exported", "wrapper"),
    ("evaluators", "visualize", "convert", "export", "predict", "doctor"),
    ("hub",),
    ("engine",),
    ("cli",),
)
# Users look for it among the models, and it stands above them.
HUB = "models/hub.py"
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}

# A name, with everything below it, and the only files or folders that may use it.
OWNERS = {
    "paddle.distributed": ("distributed.py",),
    "paddle.save": ("checkpoint.py", "convert/"),
    "paddle.load": ("checkpoint.py", "convert/"),
    **dict.fromkeys(("os.environ", "os.getenv", "os.putenv", "sys.argv"), ("cli/", "__init__.py")),
    # A data worker is a process of its own: it may end itself, never the program.
    **dict.fromkeys(("sys.exit", "os._exit"), ("cli/", "__init__.py", "data/workers.py")),
    **dict.fromkeys(("eval", "exec", "exit", "quit"), ()),
}
PRIVATE_OWNERS = {"_param_groups": ("engine/optim.py",)}


# --- names: what a source refers to ---


def imported(tree: ast.Module, path: str) -> Iterator[tuple[str, Optional[str], int]]:
    """Full name, local name (None: binds nothing new) and line of everything a source imports."""
    package = ["passl", *path.split("/")[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, alias.asname, node.lineno
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                yield f"{module}.{alias.name}", alias.asname or alias.name, node.lineno


def dotted(node: ast.AST) -> Optional[str]:
    """`a.b.c` of a chain of attributes that starts at a name."""
    if isinstance(node, ast.Name):
        return node.id
    start = dotted(node.value) if isinstance(node, ast.Attribute) else None
    return f"{start}.{node.attr}" if start else None


def used(tree: ast.Module, path: str) -> Iterator[tuple[str, int]]:
    """Full name and line of everything a source imports or uses."""
    full_names = {}
    for name, local, line in imported(tree, path):
        yield name, line
        if local:
            full_names[local] = name
    for node in ast.walk(tree):
        name = dotted(node)
        if name:
            start, _, rest = name.partition(".")
            start = full_names.get(start, start)
            yield f"{start}.{rest}" if rest else start, node.lineno


def is_below(name: str, root: str) -> bool:
    return name == root or name.startswith(f"{root}.")


# --- the rules: (path inside passl, tree) -> what breaks them ---


def breaks_floors(path: str, tree: ast.Module) -> Iterator[str]:
    own = "hub" if path == HUB else path.split("/")[0].replace(".py", "")
    if own not in FLOOR_OF:
        yield f"1: '{own}' has no floor: add it to FLOORS"
        return
    if path == "__init__.py":
        # The face of the package may offer what is above it, as long as `import passl` does not load it.
        tree = without_functions(tree)
    for name, _, line in imported(tree, path):
        if not is_below(name, "passl"):
            continue
        other = (name.split(".") + ["__init__"])[1]
        other = other if other in FLOOR_OF else "__init__"  # `from passl import __version__`
        other = "hub" if is_below(name, "passl.models.hub") else other
        ground = FLOOR_OF[own] == FLOOR_OF[other] == 0
        if other != own and not ground and FLOOR_OF[other] >= FLOOR_OF[own]:
            yield f"{line}: '{own}' imports '{other}', which is not below it"


def without_functions(tree: ast.Module) -> ast.Module:
    """What importing a source runs."""
    return ast.Module([node for node in tree.body if not isinstance(node, ast.FunctionDef)], [])


def breaks_algorithm_borders(path: str, tree: ast.Module) -> Iterator[str]:
    folders = {folder.name for folder in (PASSL / "models").iterdir() if folder.is_dir()} | {"dino", "dinov2"}
    parts = path.split("/")
    if parts[0] != "models" or len(parts) < 3:
        return
    for name, _, line in imported(tree, path):
        for folder in folders - {parts[1]}:
            if is_below(name, f"passl.models.{folder}"):
                yield f"{line}: algorithm '{parts[1]}' imports algorithm '{folder}'"


def breaks_ownership(path: str, tree: ast.Module) -> Iterator[str]:
    for name, line in used(tree, path):
        for root, owners in OWNERS.items():
            if is_below(name, root) and not path.startswith(owners):
                yield f"{line}: {root} belongs to {' and '.join(owners) or 'nobody'}"
    for node in ast.walk(tree):
        for root, owners in PRIVATE_OWNERS.items():
            names = (getattr(node, "attr", None), getattr(node, "value", None))
            if root in [name for name in names if isinstance(name, str)] and not path.startswith(owners):
                yield f"{node.lineno}: {root} belongs to {' and '.join(owners)}"
        if isinstance(node, ast.Raise) and not path.startswith(OWNERS["sys.exit"]):
            raised = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            if raised is not None and dotted(raised) == "SystemExit":
                yield f"{node.lineno}: SystemExit belongs to {' and '.join(OWNERS['sys.exit'])}"


def breaks_error_handling(path: str, tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.ExceptHandler):
            continue
        if node.type is None:
            yield f"{node.lineno}: a bare except"
        elif dotted(node.type) in ("Exception", "BaseException"):
            silent = (ast.Pass, ast.Continue)
            if all(isinstance(one, silent) or is_ellipsis(one) for one in node.body):
                yield f"{node.lineno}: an exception is swallowed"


def is_ellipsis(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and node.value.value is Ellipsis


def breaks_signatures(path: str, tree: ast.Module) -> Iterator[str]:
    """The configuration is checked against the signatures of what is registered: they must say everything."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and is_registered(node):
            for function in constructors(node):
                for extra in (function.args.vararg, function.args.kwarg):
                    if extra is not None:
                        yield f"{function.lineno}: registered '{node.name}' takes *{extra.arg}"
    for annotation in schema_annotations(tree):
        for part in ast.walk(annotation):
            if isinstance(part, ast.BinOp) and isinstance(part.op, ast.BitOr):
                yield f"{part.lineno}: write Optional or Union, `|` needs Python 3.10"


def schema_annotations(tree: ast.Module) -> Iterator[ast.expr]:
    """The annotations of parameters and of a class's fields."""
    for node in ast.walk(tree):
        if isinstance(node, ast.arg) and node.annotation:
            yield node.annotation
        if isinstance(node, ast.ClassDef):
            yield from (field.annotation for field in node.body if isinstance(field, ast.AnnAssign))


def is_registered(node: ast.AST) -> bool:
    calls = [decorator for decorator in node.decorator_list if isinstance(decorator, ast.Call)]
    return any(isinstance(call.func, ast.Attribute) and call.func.attr == "register" for call in calls)


def constructors(node: ast.AST) -> list[ast.FunctionDef]:
    if isinstance(node, ast.FunctionDef):
        return [node]
    return [item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == "__init__"]


RULES = (
    breaks_floors,
    breaks_algorithm_borders,
    breaks_ownership,
    breaks_error_handling,
    breaks_signatures,
)


def violations(path: str, source: str) -> list[str]:
    tree = ast.parse(source)
    return [f"passl/{path}:{message}" for rule in RULES for message in rule(path, tree)]


# --- tests ---


def test_passl_keeps_every_rule():
    files = sorted(PASSL.rglob("*.py"))
    assert files
    found = [
        violation
        for file in files
        for violation in violations(file.relative_to(PASSL).as_posix(), file.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(["", *found])


@pytest.mark.parametrize(
    ("path", "source", "message"),
    [
        # floors
        ("schedules.py", "import passl.models", "'schedules' imports 'models', which is not below it"),
        ("data/loader.py", "from passl.models import probe", "'data' imports 'models'"),
        ("models/probe.py", "def f():\n    from passl import data", "2: 'models' imports 'data'"),
        ("models/dino/loss.py", "from ...engine import build", "'models' imports 'engine'"),
        ("checkpoint.py", "from passl import evaluators", "'checkpoint' imports 'evaluators'"),
        ("engine/build.py", "import passl.cli", "'engine' imports 'cli'"),
        ("attic.py", "", "'attic' has no floor"),
        ("models/__init__.py", "from passl.models import hub", "'models' imports 'hub', which is not below it"),
        ("convert/rules.py", "from passl.models.hub import OFFICIAL", "'convert' imports 'hub'"),
        ("models/hub.py", "import passl.engine", "'hub' imports 'engine'"),
        ("__init__.py", "from passl import models", "'__init__' imports 'models'"),
        # algorithms
        (
            "models/dinov2/method.py",
            "from passl.models.dino.head import DINOHead",
            "imports algorithm 'dino'",
        ),
        ("models/dino/head.py", "from .. import dinov2", "algorithm 'dino' imports algorithm 'dinov2'"),
        # owners
        (
            "engine/trainer.py",
            "import paddle.distributed as dist",
            "paddle.distributed belongs to distributed.py",
        ),
        (
            "engine/trainer.py",
            "import paddle\npaddle.distributed.get_rank()",
            "2: paddle.distributed belongs",
        ),
        ("models/dino/loss.py", "from paddle import distributed", "paddle.distributed belongs"),
        (
            "engine/trainer.py",
            "import paddle\npaddle.save({}, 'x')",
            "paddle.save belongs to checkpoint.py and",
        ),
        ("models/hub.py", "from paddle import load as read", "paddle.load belongs"),
        ("models/hub.py", "import paddle as p\np.load('x')", "2: paddle.load belongs"),
        ("engine/trainer.py", "opt._param_groups[0]", "_param_groups belongs to engine/optim.py"),
        ("engine/trainer.py", "getattr(opt, '_param_groups')", "_param_groups belongs"),
        ("log.py", "import os\nos.environ['RANK']", "os.environ belongs to cli/ and __init__.py"),
        ("data/workers.py", "import sys\nsys.argv", "sys.argv belongs to cli/ and __init__.py"),
        ("log.py", "from os import environ", "os.environ belongs"),
        ("log.py", "import os\nos.getenv('RANK')", "os.getenv belongs"),
        ("engine/build.py", "import sys\nprint(sys.argv)", "sys.argv belongs"),
        ("engine/build.py", "from sys import exit as stop", "sys.exit belongs"),
        ("engine/build.py", "raise SystemExit(2)", "SystemExit belongs"),
        ("config.py", "eval ('1')", "eval belongs to nobody"),
        ("cli/train.py", "exec ('1')", "exec belongs to nobody"),
        # errors
        ("log.py", "try:\n    f()\nexcept:\n    raise", "3: a bare except"),
        ("log.py", "try:\n    f()\nexcept Exception:\n    pass", "3: an exception is swallowed"),
        ("log.py", "try:\n    f()\nexcept BaseException as e:\n    ...", "an exception is swallowed"),
        # signatures
        ("data/x.py", "@D.register()\nclass A:\n    def __init__(self, **more): pass", "'A' takes *more"),
        ("models/x.py", "@D.register('a', 'b')\ndef vit(*sizes): pass", "registered 'vit' takes *sizes"),
        ("models/x.py", "def f(a: int | None): pass", "write Optional or Union"),
        ("models/x.py", "class A:\n    a: list[int | str] = 3", "2: write Optional or Union"),
    ],
)
def test_a_broken_rule_is_found(path, source, message):
    found = violations(path, source)
    assert found
    assert all(message in violation for violation in found), found


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("schedules.py", "from passl.registry import SCHEDULES"),
        ("__init__.py", "def list_models():\n    from passl import models"),
        (
            "engine/build.py",
            "from passl import __version__, checkpoint\nfrom passl.evaluators.knn import KNN",
        ),
        ("models/dino/method.py", "from passl.models.dino.loss import DINOLoss\nfrom . import head"),
        (
            "models/dino/method.py",
            "from passl.models.method import Method\nfrom passl.distributed import rank",
        ),
        ("models/hub.py", "import passl.models\nfrom passl import checkpoint, convert"),
        ("distributed.py", "import paddle.distributed as dist\ndist.all_reduce(x)"),
        ("convert/source.py", "import paddle\npaddle.load('x')"),
        ("engine/optim.py", "opt._param_groups"),
        ("cli/train.py", "import os, sys\nos.environ['A'] = sys.argv[0]\nsys.exit(2)"),
        ("data/workers.py", "import sys\nsys.exit(1)"),
        ("models/x.py", "def f(a: Optional[int]):\n    b: int | None = a"),
        ("models/probe.py", "self.backbone.eval()\nself.load('x')\nos.path.join('a')"),
        ("log.py", "try:\n    f()\nexcept Exception as error:\n    raise ValueError('x') from error"),
        ("log.py", "try:\n    f()\nexcept SystemExit:\n    pass"),
        (
            "data/x.py",
            "@D.register()\nclass A:\n    def f(self, **more): pass\ndef g(*a, b: int = 1 | 2): pass",
        ),
    ],
)
def test_what_is_allowed_is_not_reported(path, source):
    assert violations(path, source) == []

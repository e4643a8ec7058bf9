"""Folders are floors: a file imports only from floors below its own, and within a floor only where an arrow is drawn."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "fid_imagegen"

FLOORS = [
    {"models", "diffusion", "data", "parallel"},
    {"tasks", "interop"},
    {"training", "pipelines"},
    {"evaluation"},
]
ARROWS = {("tasks", "interop"), ("pipelines", "training")}
FOREIGN = ("tensorflow", "torch", "torchvision", "xmanager")  # slow, heavy, or not ours to depend on
ENTRY_LINES = 100


def imported(tree: ast.AST, module: str) -> list[str]:
    """Absolute names of all that a module's AST imports, `a.b` and `a.b.name` for `from a.b import name`."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")[: -node.level]
                base = ".".join([*parents, base] if base else parents)
            names += [base, *(f"{base}.{alias.name}" for alias in node.names)]
    return names


def top_level(tree: ast.Module) -> ast.Module:
    """The module without the bodies of its functions: what is run when it is imported."""

    class Strip(ast.NodeTransformer):
        def visit_FunctionDef(self, node):
            return None

        visit_AsyncFunctionDef = visit_Lambda = visit_FunctionDef

    return Strip().visit(tree)


def floor(unit: str) -> int:
    """1 to 4; 5 for the entry points and whatever else lies beside them."""
    return next((number for number, units in enumerate(FLOORS, start=1) if unit in units), len(FLOORS) + 1)


def _within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def _package_violations(module: str, names: list[str], units: set[str]) -> list[str]:
    own = module.split(".")[1] if "." in module else ""
    found = []
    for name in names:
        other = name.split(".")[1] if name.startswith(f"{PACKAGE}.") else ""
        # A name of `fid_imagegen` itself is the public list: from inside it would be a circle.
        if name != PACKAGE and other in units and own != other:
            allowed = floor(other) < floor(own) or (own, other) in ARROWS or floor(own) == floor(other) == 5
            if not allowed:
                found.append(f"{module} (floor {floor(own)}) imports {name} (floor {floor(other)})")
        elif other and other not in units:
            found.append(f"{module} imports {name} through the public list")
        elif _within(name, "configs", "launch"):
            found.append(f"{module} imports {name}: a checkout's folder")
    return found


def violations(module: str, source: str, units: set[str]) -> list[str]:
    """What is wrong with the imports of a module of the package, of `configs` or of `launch`, one line each."""
    tree = ast.parse(source)
    names = sorted(set(imported(tree, module)))
    if _within(module, "configs"):
        return [f"{module} imports {n}" for n in names if not _within(n, "ml_collections", "configs")]
    if _within(module, "launch"):
        return [f"{module} imports {n}" for n in names if _within(n, "jax", "jaxlib", "flax", PACKAGE)]
    found = _package_violations(module, names, units)
    at_import = sorted(set(imported(top_level(tree), module)))
    found += [f"{module} imports {n} when it is imported" for n in at_import if _within(n, *FOREIGN)]
    # clu's writers import tensorflow.
    clu = [n for n in at_import if _within(n, "clu") and not _within(n, "clu.parameter_overview")]
    return found + [f"{module} imports {n}" for n in clu if n != "clu" or "clu.parameter_overview" not in at_import]


def modules(folder: str) -> dict[str, Path]:
    """Dotted name -> file of every module of a folder of the checkout."""
    files = sorted((ROOT / folder).rglob("*.py"))
    names = [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files]
    return dict(zip(names, files, strict=True))


def units() -> set[str]:
    return {name.split(".")[1] for name in modules(PACKAGE)} - {"__init__"}


@pytest.mark.parametrize("folder", [PACKAGE, "configs", "launch"])
def test_imports_keep_to_their_floors(folder):
    found = modules(folder)
    assert len(found) > 5  # the files are seen at all
    wrong = [
        line for name, file in found.items() for line in violations(name, file.read_text(encoding="utf-8"), units())
    ]
    assert not wrong, "\n".join(wrong)


UNITS = {*set().union(*FLOORS), "train", "command"}


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("fid_imagegen.models.layers", "from fid_imagegen.diffusion import noise"),
        ("fid_imagegen.data.sources", "import fid_imagegen.parallel.mesh"),
        ("fid_imagegen.diffusion.noise", "def f():\n    from fid_imagegen.tasks import build"),
        ("fid_imagegen.diffusion.noise", "from fid_imagegen import tasks"),
        ("fid_imagegen.diffusion.objectives.ct", "from ...models.layers import stack"),
        ("fid_imagegen.interop.lpips", "from fid_imagegen.tasks import build"),
        ("fid_imagegen.training.loop", "from fid_imagegen.pipelines import ImageFunctionPipeline"),
        ("fid_imagegen.pipelines", "from fid_imagegen.evaluation import sheets"),
        ("fid_imagegen.evaluation.features", "if True:\n    import fid_imagegen.train"),
        ("fid_imagegen.tasks.consistency", "from fid_imagegen import ImageFunctions"),
        ("fid_imagegen.training.loop", "import configs.common"),
        ("fid_imagegen.training.writers", "import tensorflow as tf"),
        ("fid_imagegen.training.writers", "from clu import metric_writers"),
        ("fid_imagegen.training.writers", "from clu import metric_writers, parameter_overview"),
        ("fid_imagegen.training.writers", "import clu.metric_writers"),
        ("fid_imagegen.interop.lpips", "try:\n    from torch import nn\nexcept ImportError:\n    nn = None"),
        ("fid_imagegen.train", "class A:\n    from xmanager import xm"),
        ("configs.x", "from fid_imagegen import tasks"),
        ("configs.x", "import numpy as np"),
        ("launch.run", "def f():\n    import jax.numpy as jnp"),
        ("launch.run", "from fid_imagegen.training import runs"),
    ],
)
def test_the_checker_finds(module, source):
    assert violations(module, source, UNITS)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("fid_imagegen.models.layers", "import jax\nfrom fid_imagegen.models import image_function"),
        (
            "fid_imagegen.tasks.consistency",
            "from fid_imagegen.interop.lpips import load_lpips\nimport fid_imagegen.models",
        ),
        (
            "fid_imagegen.pipelines",
            "from fid_imagegen.training.runs import read_params\nfrom fid_imagegen import tasks",
        ),
        ("fid_imagegen.evaluation.features", "from ..pipelines import ImageFunctionPipeline"),
        ("fid_imagegen.train", "from fid_imagegen import command\nfrom fid_imagegen.evaluation import sheets"),
        ("fid_imagegen.interop.lpips", "def f():\n    import torch"),
        ("fid_imagegen.training.loop", "from clu import parameter_overview"),
        ("configs.x", "from configs import common\nimport ml_collections"),
        ("launch.run", "from launch import errors\nimport subprocess"),
    ],
)
def test_the_checker_lets_pass(module, source):
    assert violations(module, source, UNITS) == []


def test_every_package_says_what_it_is():
    files = [file for folder in (PACKAGE, "configs", "launch") for file in (ROOT / folder).rglob("__init__.py")]
    folders = {f.parent for folder in (PACKAGE, "configs", "launch") for f in (ROOT / folder).rglob("*.py")}
    assert {file.parent for file in files} == folders  # setuptools' find_packages would leave others out
    silent = [str(file) for file in files if not ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))]
    assert not silent


def test_entry_points_are_short():
    entries = {
        name: file for name, file in modules(PACKAGE).items() if name.count(".") == 1 and floor(name.split(".")[1]) == 5
    }
    assert {"fid_imagegen.train", "fid_imagegen.sample"} <= set(entries)
    lines = {name: len(file.read_text(encoding="utf-8").splitlines()) for name, file in entries.items()}
    long = {name: n for name, n in lines.items() if n > ENTRY_LINES + 30 * (name == "fid_imagegen.demo")}
    assert not long

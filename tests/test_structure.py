"""Who may import whom, and what an import may cost."""

import ast
import pathlib
import subprocess
import sys

import pytest

from models import list_models

ROOT = pathlib.Path(__file__).parents[1]
HEAVY = {"tensorflow", "gin", "etils", "tensorflow_datasets", "sklearn", "safetensors", "rich"}
LEAVES = [
    "train.py",
    "eval.py",
    *(
        str(p.relative_to(ROOT))
        for p in (ROOT / "scripts").glob("*.py")
        if p.name not in ("__init__.py", "command.py")
    ),
]


def sources(pattern: str) -> list[pathlib.Path]:
    found = sorted(ROOT.glob(pattern))
    assert found, pattern
    return found


def imports(path: pathlib.Path, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names


def roots(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def test_the_layers_import_keras_alone_and_a_backend_only_inside_functions():
    for path in sources("condconv/*.py"):
        assert not roots(imports(path)) & {"models", "data", *HEAVY - {"tensorflow"}}, path
        assert not roots(imports(path, top_level_only=True)) & HEAVY, path
        assert not any(name.startswith("condconv.engine") for name in imports(path)), path


def test_the_networks_import_layers_and_no_engine():
    for path in sources("models/*.py"):
        assert "data" not in roots(imports(path)), path
        assert not any(name.startswith("condconv.engine") for name in imports(path)), path
        if path.name != "configurables.py":
            assert not roots(imports(path)) & HEAVY, path


def test_the_data_imports_nothing_of_ours():
    for path in sources("data/*.py"):
        assert not roots(imports(path)) & {"condconv", "models"}, path


def test_the_engine_imports_neither_networks_nor_data():
    for path in sources("condconv/engine/**/*.py"):
        assert not roots(imports(path)) & {"models", "data"}, path


def test_commands_are_short_leaves():
    for path in sources("**/*.py"):
        if ".venv" in path.parts:
            continue
        ours = imports(path) - {"scripts", "scripts.command"}
        assert not roots(ours) & {"train", "eval", "scripts"}, path
    for leaf in LEAVES:
        assert len((ROOT / leaf).read_text().splitlines()) <= 75, leaf
        assert roots(imports(ROOT / leaf, top_level_only=True)) <= {
            "absl",
            "json",
            "scripts",
        }


def test_gin_is_never_asked_to_skip_what_it_does_not_know():
    for path in sources("**/*.py"):
        if ".venv" not in path.parts and path != pathlib.Path(__file__):
            assert "skip_unknown" not in path.read_text(), path


def test_no_circle_of_imports():
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for pattern in ("condconv/**/*.py", "models/*.py", "data/*.py")
        for path in sources(pattern)
    }
    graph = {m: {n for n in imports(path, True) if n in modules} for m, path in modules.items()}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " → ".join((*path, module))
        if module not in done:
            for other in graph[module]:
                visit(other, (*path, module))
            done.add(module)

    for module in modules:
        visit(module, ())


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={"PATH": "", "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_importing_condconv_loads_nothing_heavy():
    done = python("import sys, condconv; print({'keras', 'numpy', 'absl'} & set(sys.modules))")
    assert done.stdout.strip() == "set()", done.stderr


@pytest.mark.parametrize("first", ["condconv", "keras"])
def test_the_layers_are_registered_whichever_is_imported_first(first):
    second = {"condconv": "keras", "keras": "condconv"}[first]
    code = f"import {first}, {second}, keras; get = keras.saving.get_registered_object; "
    code += "print([get(f'condconv>{n}').__name__ for n in "
    code += "('CondConv2D', 'Routing', 'BatchNormalization', 'Dropout', 'Logits')])"
    done = python(code, KERAS_BACKEND="jax")
    assert "'CondConv2D'" in done.stdout, done.stderr


@pytest.mark.parametrize(
    "names",
    [
        ("mobilenet_v1", "mnasnet_a1"),
        pytest.param(tuple(list_models()), marks=pytest.mark.slow),
    ],
    ids=["two", "all"],
)
def test_networks_run_on_jax_where_there_is_no_tensorflow(names):
    code = f"""
import sys
for name in ("tensorflow", "gin", "etils", "sklearn"):
    sys.modules[name] = None
import jax
import numpy as np
from condconv import count_cost
from models import create_model
for name in {names}:
    model = create_model(name, num_experts=2, width=0.1, image_size=32, num_classes=3)
    assert count_cost(model).mixing > 0  # traces the whole network
    if name == "mobilenet_v1":
        assert jax.jit(model)(np.zeros((2, 32, 32, 3), np.uint8)).shape == (2, 3)
print("ran", len({names}))
"""
    done = python(code, KERAS_BACKEND="jax")
    assert done.stdout.strip() == f"ran {len(names)}", done.stderr


def test_a_git_checkout_keeps_folders_called_data_and_models():
    done = subprocess.run(
        ["git", "check-ignore", "data/digits.py", "models/blocks.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.stdout == ""


def test_locks_hold_hashes_and_no_address():
    for lock in ("requirements.lock", "requirements-tpu.lock"):
        text = (ROOT / lock).read_text()
        assert "--hash=sha256:" in text
        assert "://" not in text
        assert "index-url" not in text

"""Who may import whom, and what an import may cost."""

import ast
import dataclasses
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest
from on_jax import HASTY

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


def imported(path: pathlib.Path, top_level_only: bool = False) -> Iterator[tuple[str, str]]:
    """Yields what is imported, and the module that it is taken from."""
    tree = ast.parse(path.read_text())
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((f"{node.module}.{alias.name}", node.module) for alias in node.names)


def imports(path: pathlib.Path, top_level_only: bool = False) -> set[str]:
    return {name for names in imported(path, top_level_only) for name in names}


def roots(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def strings_that_name_modules(path: pathlib.Path) -> set[str]:
    """Returns the strings that are loaded, or run in another process, as modules of ours."""
    texts = (n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant))
    named = re.compile(r"(condconv|models|data|scripts)([.:][a-zA-Z_]+)+")
    return {t.replace(":", ".") for t in texts if isinstance(t, str) and named.fullmatch(t)}


LIBRARY, ENGINE, TOOLS = "condconv", "condconv.engine", "condconv.tools"
TENSORFLOW = "condconv.engine.backends.tensorflow"
FRAMEWORKS = {"tensorflow", "jax", "torch", "scipy"}


@dataclasses.dataclass(frozen=True)
class Room:
    """Files, what of ours they may not name, and what else they may not import.

    Attributes:
        pattern: of the files.
        closed: modules of ours, with all below them.
        foreign: packages that they import nowhere.
        late: packages that they import inside functions at most.
    """

    pattern: str
    closed: tuple[str, ...]
    foreign: frozenset[str] = frozenset()
    late: frozenset[str] = frozenset()


ELSEWHERE = ("models", "data", "scripts")
ROOMS = (
    Room("condconv/*.py", (ENGINE, TOOLS, *ELSEWHERE), HEAVY - {"tensorflow"}, HEAVY),
    Room("condconv/engine/*.py", (TOOLS, TENSORFLOW, *ELSEWHERE), FRAMEWORKS),
    Room("condconv/engine/tasks/*.py", (TOOLS, TENSORFLOW, *ELSEWHERE), FRAMEWORKS),
    Room("condconv/engine/backends/*.py", (TOOLS, *ELSEWHERE), FRAMEWORKS),
    Room("condconv/engine/backends/tensorflow/*.py", (TOOLS, *ELSEWHERE), frozenset({"jax"})),
    Room("condconv/tools/**/*.py", (TENSORFLOW, *ELSEWHERE)),
    Room("models/*.py", (ENGINE, TOOLS, "data", "scripts"), HEAVY - {"gin"}, HEAVY - {"gin"}),
    Room("data/*.py", (LIBRARY, "models", "scripts")),
    Room("scripts/command.py", (LIBRARY, "models", "data"), frozenset(), HEAVY | {"keras"}),
)


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.pattern)
def test_a_room_imports_what_it_may(room):
    for path in sources(room.pattern):
        names = imports(path)
        for name in names | strings_that_name_modules(path):
            closed = [c for c in room.closed if name == c or name.startswith(f"{c}.")]
            assert not closed, f"{path} names {name}"
        assert not roots(names) & room.foreign, path
        assert not roots(imports(path, top_level_only=True)) & room.late, path


def test_gin_is_in_one_file_of_the_networks():
    having = [p.name for p in sources("models/*.py") if "gin" in roots(imports(p))]
    assert having == ["configurables.py"]


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
    graph = {
        module: {whole if whole in modules else origin for whole, origin in imported(path, True)}
        for module, path in modules.items()
    }
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " → ".join((*path, module))
        if module not in done:
            for other in graph[module] & modules.keys():
                visit(other, (*path, module))
            done.add(module)

    for module in modules:
        visit(module, ())


def python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env={"PATH": "", "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_importing_condconv_registers_the_layers_and_loads_nothing_but_keras():
    code = """
import sys
import keras
before = set(sys.modules)
import condconv
new = set(sys.modules) - before
print(*{name.split(".")[0] for name in new} - sys.stdlib_module_names, *new & {%r, %r})
for name in sys.argv[1:]:
    print(keras.saving.get_registered_object(f"condconv>{name}").__name__)
"""
    code = code % ("condconv.engine", "condconv.tools")
    names = ("CondConv2D", "Routing", "DepthwiseConv2D", "BatchNormalization", "Dropout", "swish")
    done = python(code, *names, KERAS_BACKEND="jax")
    assert done.stdout.split() == ["condconv", *names], done.stderr


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
    done = python(code, KERAS_BACKEND="jax", XLA_FLAGS=HASTY)
    assert done.stdout.strip() == f"ran {len(names)}", done.stderr


def loaded_by_the_loop() -> list[str]:
    """Returns the modules of ours that a training step needs, the TensorFlow backend included."""
    code = "import sys, condconv.engine.loop, condconv.engine.backends.tensorflow; "
    code += "print(*(name for name in sys.modules if name.startswith('condconv.')))"
    done = python(code, TF_CPP_MIN_LOG_LEVEL="3")
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_a_step_needs_few_modules_and_no_tools():
    loaded = loaded_by_the_loop()
    assert not [name for name in loaded if name.startswith("condconv.tools")]
    assert len([name for name in loaded if name.startswith("condconv.engine")]) <= 22
    for name in loaded:
        path = ROOT.joinpath(*name.split("."))
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        assert "scipy" not in roots(imports(path)), name


def test_the_core_of_the_engine_needs_neither_tensorflow_nor_data_sets():
    code = """
import sys
for name in ("tensorflow", "tensorflow_datasets", "sklearn", "matplotlib"):
    sys.modules[name] = None
import condconv.engine.loop, condconv.engine.evaluation, condconv.engine.checkpoints
print("imported")
"""
    done = python(code, KERAS_BACKEND="jax")
    assert done.stdout.strip() == "imported", done.stderr


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

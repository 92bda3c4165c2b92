"""The rooms' order, what each may import, and what importing them costs. docs/architecture.md has the picture."""

import ast
import importlib
import importlib.metadata
import os
import pathlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from typing import NamedTuple

import pytest

ROOT = pathlib.Path(__file__).parents[1]
HOMES = {"fps_convert": ROOT / "convert", "fps_train": ROOT / "train"}  # the others lie in ROOT
ANY = "*"


class Room(NamedTuple):
    """What the files of a room may import, at any depth of its folders.

    Attributes:
      rooms: others of ours, each above it in the table.
      packages: other people's.
      inside: ours or theirs, inside functions only: whoever doesn't call the function needn't have it, nor wait for it.
    """

    rooms: str = ""
    packages: str = ""
    inside: str = ""


LEAVES = (
    "fps_jax.causal fps_jax.choices fps_jax.compilation fps_jax.config fps_jax.errors fps_jax.files fps_jax.foreign "
    "fps_jax.interrupts fps_jax.mesh fps_jax.processes fps_jax.progress fps_jax.sizes"
)
ARRAYS = "jax jaxtyping numpy"
# The one table. A room is a package, or a module of one that others need alone; a new one needs its line here.
ROOMS = {
    "pallas_kernels": Room("", ARRAYS, inside="jaxlib"),
    "fps_jax.choices": Room(),
    "fps_jax.causal": Room("fps_jax.choices"),
    "fps_jax.compilation": Room(inside="jax"),
    "fps_jax.sizes": Room(),
    "fps_jax.config": Room("fps_jax.causal fps_jax.choices fps_jax.sizes"),
    "fps_jax.files": Room(),
    "fps_jax.foreign": Room(),
    "fps_jax.interrupts": Room(),
    "fps_jax.progress": Room(inside="tqdm"),
    "fps_jax.errors": Room("fps_jax.foreign fps_jax.interrupts fps_jax.progress", inside="fps_jax tyro"),
    "fps_jax.mesh": Room(),
    "fps_jax.processes": Room(),
    "fps_jax.media": Room(LEAVES, ARRAYS, inside="PIL av matplotlib"),
    "fps_jax.profiling": Room(f"{LEAVES} fps_jax.media", inside="fps_jax jax"),
    "fps_jax.attention": Room(f"{LEAVES} pallas_kernels", ARRAYS),
    "fps_jax.models": Room(
        f"{LEAVES} pallas_kernels fps_jax.attention", f"{ARRAYS} einops flax", inside="ftfy tokenizers"
    ),
    "fps_jax.checkpoints": Room(
        f"{LEAVES} fps_jax.attention fps_jax.models", ARRAYS, inside="fps_convert huggingface_hub orbax"
    ),
    "fps_convert": Room(f"{LEAVES} fps_jax.models fps_jax.checkpoints", "ml_dtypes numpy tyro", inside="tokenizers"),
    "fps_jax.sampling.request_fields": Room("fps_jax.choices fps_jax.config fps_jax.sizes"),
    "fps_jax.sampling": Room(
        f"{LEAVES} fps_jax.sampling.request_fields fps_jax.media fps_jax.profiling fps_jax.attention fps_jax.models "
        "fps_jax.checkpoints",
        ARRAYS,
        inside="PIL",
    ),
    "fps_jax.tuning.defaults": Room(),
    "fps_jax.tuning": Room(
        f"{LEAVES} fps_jax.tuning.defaults pallas_kernels fps_jax.media fps_jax.attention fps_jax.models fps_jax.sampling",
        ARRAYS,
    ),
    "fps_jax.evaluation": Room(
        f"{LEAVES} fps_jax.media fps_jax.attention fps_jax.models fps_jax.sampling", f"{ARRAYS} scipy", inside="PIL"
    ),
    "fps_jax.live": Room(f"{LEAVES} fps_jax.media", "", inside="fps_jax.sampling jax starlette uvicorn"),
    # The front door itself, fps_jax/__init__.py: what it exports is fetched when it is asked for.
    "fps_jax": Room(
        inside="fps_jax.causal fps_jax.media fps_jax.profiling fps_jax.attention fps_jax.sampling fps_convert"
    ),
    "fps_train.config": Room(LEAVES, inside="tomli_w"),
    "fps_train.vae_options": Room(),
    "fps_train.host_options": Room(),
    "fps_train": Room(
        f"{LEAVES} fps_train.config fps_train.vae_options fps_train.host_options pallas_kernels fps_jax.media "
        "fps_jax.attention fps_jax.models fps_jax.checkpoints fps_jax.sampling fps_jax.evaluation",
        f"{ARRAYS} optax scipy",
        inside="fps_jax PIL array_record av orbax safetensors tensorboardX tomli_w tqdm wandb",
    ),
    "fps_train.commands": Room(
        f"{LEAVES} fps_train.config fps_train.vae_options fps_train.host_options",
        "tyro",
        inside="fps_train fps_jax.media fps_jax.attention fps_jax.models fps_jax.checkpoints fps_jax.sampling "
        "fps_jax.evaluation jax numpy",
    ),
    # Arguments are parsed before jax is imported.
    "fps_jax.commands": Room(
        f"{LEAVES} fps_jax.sampling.request_fields fps_jax.tuning.defaults",
        "tyro",
        inside="pallas_kernels fps_jax fps_jax.media fps_jax.profiling fps_jax.attention fps_jax.models fps_jax.checkpoints "
        "fps_jax.sampling fps_jax.tuning fps_jax.evaluation fps_jax.live jax numpy",
    ),
    "benchmarks": Room(ANY, ANY),  # on top: they also compare with what isn't ours
}
TOPS = {room.split(".")[0] for room in ROOMS} | {"tests"}


def file_of(module: str) -> pathlib.Path | None:
    """The file of one of our modules or packages."""
    path = HOMES.get(module.split(".")[0], ROOT) / module.replace(".", "/")
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.exists()), None)


def room_of(module: str) -> str | None:
    """The room that a module of ours lies in; only its __init__ is in the front door."""
    if module == "fps_jax":
        return module
    inner = [room for room in ROOMS if room != "fps_jax" and f"{module}.".startswith(f"{room}.")]
    return max(inner, key=len) if inner else None


def modules() -> dict[str, pathlib.Path]:
    """Every module of ours but the tests, by its dotted name."""
    found = {}
    for top in sorted(TOPS - {"tests"}):
        home = HOMES.get(top, ROOT)
        for file in sorted((home / top).rglob("*.py")):
            if "standins" not in file.parts:  # they take the place of packages that are missing
                found[".".join(file.relative_to(home).with_suffix("").parts).removesuffix(".__init__")] = file
    return found


def imports(tree: ast.AST, inside: bool = False) -> Iterator[tuple[str, bool]]:
    """(what is imported, is it inside a function or for type checkers only), of the whole file."""
    for node in ast.iter_child_nodes(tree):
        late = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or (
            isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        )
        if isinstance(node, ast.Import):
            yield from ((alias.name, inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: a relative import"
            yield from ((f"{node.module}.{alias.name}", inside) for alias in node.names)
        yield from imports(node, inside or late)


def imported(name: str) -> str:
    """A room of ours, or the top package of somebody else's, of a dotted name that may end in what a module defines."""
    top = name.split(".")[0]
    if top not in TOPS or top == "tests":
        return top
    while not file_of(name):
        name = name.rpartition(".")[0]
        assert name
    return room_of(name) or name


def test_every_module_lies_in_a_room():
    for module, file in modules().items():
        assert room_of(module), f"{file.relative_to(ROOT)} lies in no room of the table; see docs/architecture.md"
    for room in ROOMS:
        assert file_of(room), f"the table has {room}, which isn't there"


def test_the_table_is_an_order():
    seen: list[str] = []
    for name, room in ROOMS.items():
        assert room.rooms == ANY or set(room.rooms.split()) <= set(seen), f"{name} uses a room below it in the table"
        seen.append(name)


@pytest.mark.parametrize("name", ROOMS)
def test_rooms_import_only_what_the_table_lets_them(name):
    room = ROOMS[name]
    always, inside = {*room.rooms.split(), *room.packages.split()}, set(room.inside.split())
    files = [(module, file) for module, file in modules().items() if room_of(module) == name]
    assert files
    for _, file in files:
        for what, late in imports(ast.parse(file.read_text())):
            target = imported(what)
            if target == name or target in always or target in sys.stdlib_module_names or (late and target in inside):
                continue
            ours = what.split(".")[0] in TOPS
            if ANY in always and target != "tests":
                assert not ours or target in ROOMS
                continue
            where = "at module level" if target in inside else "at all"
            pytest.fail(f"{file.relative_to(ROOT)} imports {what}, which {name} may not {where}; see ROOMS")


def test_one_door_leads_to_the_converter():
    """Whoever else wants a torch checkpoint asks `open_model`. The front door only names what users import."""
    converter = [
        module
        for module, file in modules().items()
        if module.startswith("fps_jax")
        and any(what.split(".")[0] == "fps_convert" for what, _ in imports(ast.parse(file.read_text())))
    ]
    assert converter == ["fps_jax", "fps_jax.checkpoints.open"]


def test_every_package_that_we_import_is_a_declared_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *project["optional-dependencies"]["live"]]
    declared = {re.split(r"[^\w-]", line)[0].lower().replace("_", "-") for line in lines}
    providers = importlib.metadata.packages_distributions()
    used = {p for r in ROOMS.values() for p in f"{r.packages} {r.inside}".split()} - {ANY} - set(ROOMS)
    assert {"jax", "scipy", "tyro"} <= used
    for package in sorted(used - {"jaxlib", "wandb"}):  # jax brings its own; W&B is used where it is
        names = {name.lower().replace("_", "-") for name in providers[package]}
        assert names & declared, f"{package} (of {', '.join(sorted(names))}) is not in pyproject.toml's dependencies"


def test_the_library_imports_without_what_is_for_functions_only():
    others = ("fps_jax.commands", "fps_train.commands", "fps_convert", "benchmarks")
    core = {name: room for name, room in ROOMS.items() if name not in others}
    names = [module for module in modules() if room_of(module) in core]
    assert "fps_jax.sampling.pipeline" in names
    inside = {p for room in core.values() for p in room.inside.split()} - set(ROOMS) - {"jaxlib"}
    inside -= {p for room in core.values() for p in room.packages.split()}  # jax, that some need only later
    blocked = sorted(inside - {"orbax"})  # flax itself imports that
    assert "tyro" in blocked
    code = f"import sys\nfor name in {blocked}: sys.modules[name] = None\nimport {', '.join(names)}\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_and_its_configs_loads_no_jax():
    modules = "fps_jax, fps_jax.config, fps_jax.errors, fps_jax.sampling.request_fields"
    code = f"import sys, {modules}\nassert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_a_command_parses_its_arguments_without_what_takes_long_to_import():
    """A word that it starts can't be said before."""
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"].values()
    modules = sorted({script.partition(":")[0] for script in scripts})
    slow = {"av", "flax", "jax", "matplotlib", "numpy", "orbax", "PIL", "scipy", "tokenizers", "tqdm"}
    code = f"import sys, {', '.join(modules)}\nassert not {slow} & set(sys.modules), {slow} & set(sys.modules)"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, {ROOT, *HOMES.values()}))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=env, check=False)
    assert done.returncode == 0, done.stderr


def test_only_tests_of_benchmarks_import_them():
    for file in (ROOT / "tests").rglob("*.py"):
        if file.relative_to(ROOT / "tests").parts[0] != "benchmarks":
            assert not re.search(r"^\s*(from|import) benchmarks\b", file.read_text(), re.MULTILINE), file


def named(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """(module, name) of all that is imported by name from the library, at any depth."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in TOPS - {"benchmarks", "tests"}:
            yield from ((str(node.module), alias.name) for alias in node.names)


def test_what_benchmarks_and_pages_import_is_there():
    """No type checker reads these, and most benchmarks run on no machine that tests."""
    trees = {str(file.relative_to(ROOT)): ast.parse(file.read_text()) for file in (ROOT / "benchmarks").rglob("*.py")}
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for number, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL), 1):
            trees[f"{page.name}, block {number}"] = ast.parse(block)
    found = {(where, *pair) for where, tree in trees.items() for pair in named(tree)}
    assert len(found) > 100
    for where, module, name in sorted(found):
        is_there = hasattr(importlib.import_module(module), name) or file_of(f"{module}.{name}") is not None
        assert is_there, f"{where}: {module} has no {name}"

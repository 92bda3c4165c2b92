"""The direction of imports between the rooms, and what importing them costs."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
# A room may import, at module level, the rooms named here. `fps_jax` reaches `convert` from inside functions only.
MAY_IMPORT = {
    "pallas_kernels": {"pallas_kernels"},
    "fps_jax": {"fps_jax", "pallas_kernels"},
    "convert": {"convert", "fps_jax"},
    "train": {"train", "fps_jax", "pallas_kernels"},
}
LAZY_ONLY = {
    "tyro",
    "av",
    "PIL",
    "tokenizers",
    "sentencepiece",
    "ftfy",
    "tqdm",
    "rich",
    "orbax",
    "huggingface_hub",
    "matplotlib",
    "safetensors",
}


def is_command(file: pathlib.Path) -> bool:
    return file.parent.name == "commands"


def module_level_imports(tree: ast.Module):
    for node in tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_rooms_import_only_in_the_agreed_direction(room):
    files = list((ROOT / room).rglob("*.py"))
    assert files
    for file in files:
        for name in module_level_imports(ast.parse(file.read_text())):
            assert name not in MAY_IMPORT or name in MAY_IMPORT[room], f"{file.relative_to(ROOT)} imports {name}"
            assert name not in ("torch", "diffusers", "transformers"), f"{file.relative_to(ROOT)} imports {name}"
            if room in ("fps_jax", "pallas_kernels") and not is_command(file):
                assert name not in LAZY_ONLY, f"{file.relative_to(ROOT)} imports {name} at module level"


def test_the_library_imports_with_only_jax_flax_numpy_einops_and_jaxtyping():
    modules = [
        ".".join(f.relative_to(ROOT).with_suffix("").parts)
        for room in ("pallas_kernels", "fps_jax")
        for f in sorted((ROOT / room).rglob("*.py"))
        if not is_command(f) and f.name != "__init__.py"
    ]
    assert "fps_jax.sampling.pipeline" in modules
    blocked = sorted(LAZY_ONLY - {"orbax", "rich"})  # flax itself imports these
    code = f"import sys\nfor name in {blocked}: sys.modules[name] = None\nimport {', '.join(modules)}\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_and_its_configs_loads_no_jax():
    code = "import sys, fps_jax, fps_jax.config, fps_jax.errors\nassert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)

"""The wheel: it holds every module, installs packages under names of its own, and runs nobody else's convert.py or train.py."""

import importlib.metadata
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from tests.checkpoints import T2V

ROOT = pathlib.Path(__file__).parents[1]
PACKAGES = {"fps_jax": ROOT, "pallas_kernels": ROOT, "fps_convert": ROOT / "convert", "fps_train": ROOT / "train"}


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def install(folder: pathlib.Path) -> pathlib.Path:
    """A new folder with nothing but the installed wheel. Built from a copy: setuptools writes beside what it builds."""
    source, target = folder / "source", folder / "installed"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for package, home in PACKAGES.items():
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(home / package, source / home.relative_to(ROOT) / package, ignore=ignored)
    offline = ("--no-index", "--no-deps")
    pip("wheel", *offline, "--no-build-isolation", "--wheel-dir", str(source / "wheels"), str(source))
    (wheel,) = (source / "wheels").glob("fps_jax-*.whl")
    pip("install", *offline, "--target", str(target), str(wheel))
    return target


@pytest.mark.slow
def test_the_wheel_is_whole_and_a_convert_py_or_train_py_of_the_users_is_never_run(tmp_path):
    installed = install(tmp_path)
    assert {p.name for p in installed.iterdir() if not p.name.endswith(".dist-info")} == {*PACKAGES, "bin"}
    for package, home in PACKAGES.items():
        ours, theirs = (
            {p.relative_to(folder) for p in (folder / package).rglob("*") if p.is_file() and p.suffix != ".pyc"}
            for folder in (home, installed)
        )
        assert ours == theirs

    users = tmp_path / "users"
    users.mkdir()
    for name in ("convert", "train"):
        code = "import pathlib\npathlib.Path(__file__).with_suffix('.was_run').touch()\nraise SystemExit(f'{__file__} was run')\n"
        (users / f"{name}.py").write_text(code)
    (distribution,) = importlib.metadata.distributions(path=[str(installed)])
    commands = {entry.name: entry.value for entry in distribution.entry_points}
    assert set(commands) == {
        "fps-sample",
        "fps-info",
        "fps-calibrate",
        "fps-compare",
        "fps-drift",
        "fps-stream",
        "fps-live",
        "fps-tune",
        "fps-convert",
        "fps-precompute",
        "fps-train",
        "fps-train-vae",
    }
    code = f"""
import importlib, fps_convert, fps_jax, fps_train, pallas_kernels
for package in (fps_convert, fps_jax, fps_train, pallas_kernels):
    assert package.__file__.startswith({str(installed)!r}), package.__file__
for command in {sorted(commands.values())}:
    module, name = command.split(":")
    assert callable(getattr(importlib.import_module(module), name))
for name in fps_jax.__all__:
    assert getattr(fps_jax, name).__name__ == name
fps_jax.WanPipeline.from_pretrained({str(T2V)!r}, dtype="float32")
"""
    # The working directory, with the two files, comes first on the path of `python -c`.
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    environment.pop("PYTHONSAFEPATH", None)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=users, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in users.iterdir() if p.name != "__pycache__") == ["convert.py", "train.py"]

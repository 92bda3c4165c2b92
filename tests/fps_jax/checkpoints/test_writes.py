"""A disk that fills while Orbax writes: one error, nothing said beside it, nothing left."""

import os
import subprocess
import sys

import pytest

from fps_jax.checkpoints.writes import orbax_writes


def test_a_disk_that_fills_on_the_way_is_one_line_and_leaves_nothing(tmp_path):
    """A limit on file sizes stands in for it: both fail inside write, in TensorStore's threads, with other writes under way."""
    code = (
        "import resource, signal, sys, numpy as np\n"
        "from fps_jax.checkpoints.format import save_component\n"
        "from fps_jax.errors import run_cli\n"
        "from fps_jax.files import new_directory\n"
        "def main(_):\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (50000, 50000))\n"
        "    params = {f'kernel{i}': np.ones((2, 500 if i < 30 else 50000), np.float32) for i in range(40)}\n"
        "    with new_directory(sys.argv[1]) as fresh:\n"
        "        save_component(fresh / 'dit', params)\n"
        "sys.exit(run_cli(main, []))"
    )
    env = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "JAX_PLATFORMS": "cpu"}
    env.pop("JAX_COMPILATION_CACHE_DIR", None)
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "out")], capture_output=True, text=True, check=False, env=env
    )
    assert done.stderr == f"error: {tmp_path / 'out'}: File too large; make room, or choose another path\n"
    assert done.returncode == 2
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (ValueError('RESOURCE_EXHAUSTED: Error writing local file "x"'), 28),
        (ValueError("Failed to write: Disk quota exceeded [os_error_code='122']"), 122),
        (ValueError("PERMISSION_DENIED: Permission denied"), 13),
        (OSError(30, "Read-only file system"), 30),
    ],
)
def test_what_orbax_says_of_a_disk_is_an_error_of_the_folder(tmp_path, error, number):
    def write():
        with orbax_writes(tmp_path):
            raise error

    with pytest.raises(OSError, match=str(tmp_path)) as told:
        write()
    assert told.value.errno == number


def test_other_errors_stay_what_they_are(tmp_path):
    def write():
        with orbax_writes(tmp_path):
            raise KeyError("defect")

    with pytest.raises(KeyError):
        write()

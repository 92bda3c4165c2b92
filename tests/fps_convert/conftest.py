"""Tiny synthetic checkpoints, written once."""

import shutil

import pytest

from fps_convert.synthetic import tiny_config, write_checkpoint
from fps_jax.config import WanConfig
from tests.checkpoints import T2V


@pytest.fixture(scope="session")
def pristine(tmp_path_factory):
    """`pristine(layout, task)`: a whole tiny checkpoint, to read from only."""
    made = {}

    def get(layout: str, task: str = "t2v", **options):
        key = (layout, task, repr(options))
        if key not in made:
            path = tmp_path_factory.mktemp("pristine") / "checkpoint"
            config: WanConfig = tiny_config(task, **options.pop("config", {}))
            write_checkpoint(path, config, layout=layout, tokenizer_dir=T2V / "tokenizer", **options)
            made[key] = path
        return made[key]

    return get


@pytest.fixture
def source(pristine, tmp_path):
    """`source(layout, task)`: a copy to damage."""

    def get(layout: str, task: str = "t2v", **options):
        path = tmp_path / "source"
        shutil.copytree(pristine(layout, task, **options), path)
        return path

    return get

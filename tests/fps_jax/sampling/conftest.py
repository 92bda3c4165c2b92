"""Streams of the tiny checkpoint, made once for all their tests. Tests of other pipelines have a `pipe` of their own."""

import pytest

from fps_jax import CausalPipeline
from tests.checkpoints import T2V
from tests.fps_jax.sampling.boat import BOAT, CAUSAL, SIZE


@pytest.fixture(scope="session")
def pipe() -> CausalPipeline:
    return CausalPipeline.from_pretrained(T2V, causal=CAUSAL, dtype="float32")


@pytest.fixture(scope="session")
def boat(pipe):
    """Four blocks: the window leaves the first behind."""
    return list(pipe.stream(BOAT, seed=3, blocks=4, **SIZE))

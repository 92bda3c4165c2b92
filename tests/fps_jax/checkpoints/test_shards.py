"""Weights are read straight into their shards: no device, and no buffer of the host, holds more than a device's part."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fps_convert import to_flax
from fps_jax.checkpoints.format import save_component
from fps_jax.checkpoints.open import open_model
from fps_jax.checkpoints.runs import FORMAT, VERSION
from fps_jax.models.dit import build_dit
from fps_jax.models.lora import LoRAConfig, init_lora
from fps_jax.models.params import abstract_params, flatten, init_params
from fps_jax.models.sharding import make_mesh, param_shardings
from tests.checkpoints import T2V
from tests.live_bytes import shard_bytes, watching

MESHES = [{"fsdp": 8}, {"data": 2, "context": 2, "tensor": 2}]


@pytest.fixture(scope="module", params=["theirs", "ours"])
def model(request, tmp_path_factory):
    if request.param == "theirs":
        return open_model(T2V)
    path = tmp_path_factory.mktemp("ours") / "tiny"
    to_flax(T2V, path)
    return open_model(path)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_a_component_is_read_into_its_shards(model, sizes, monkeypatch):
    shardings = param_shardings(abstract_params(build_dit(model.config.dit)), make_mesh(sizes))
    want = dict(flatten(jax.device_get(model.load("dit", jnp.bfloat16))))
    with watching(monkeypatch) as watch:
        got = model.load("dit", jnp.bfloat16, shardings)
    share, whole = shard_bytes(got), sum(leaf.nbytes for leaf in want.values())
    assert share < 0.6 * whole, "the tiny model's vectors are whole everywhere"
    assert watch.peak == share, "a device never held more than its own part"
    assert 0 < max(watch.put) <= max(shard_bytes(leaf) for leaf in jax.tree.leaves(got)), "nor did the host"
    where = dict(flatten(shardings))
    for path, leaf in flatten(got):
        assert leaf.sharding == where[path], path
        assert leaf.dtype == want[path].dtype, path
        np.testing.assert_array_equal(np.asarray(leaf), want[path], err_msg=path)


@pytest.mark.parametrize("lora", [None, LoRAConfig(rank=4, alpha=4.0)], ids=["weights", "adapters"])
def test_a_run_s_weights_take_the_place_of_the_base_s_shard_by_shard(lora, tmp_path, monkeypatch):
    base, key = open_model(T2V), jax.random.key(0)
    shapes = abstract_params(build_dit(base.config.dit))
    trained = init_params(build_dit(base.config.dit), key) if lora is None else init_lora(base.config.dit, lora, key)
    trained = jax.tree.map(lambda a: np.asarray(a + 0.1), trained)  # the adapters' B starts as 0
    save_component(tmp_path / "checkpoints" / "1" / "params", trained)
    record = {"format": FORMAT, "version": VERSION, "model": str(T2V), "base": str(T2V)}
    settings = None if lora is None else dataclasses.asdict(lora)
    (tmp_path / "run.json").write_text(json.dumps({**record, "lora": settings}))
    run, shardings = open_model(tmp_path), param_shardings(shapes, make_mesh({"fsdp": 8}))
    want = dict(flatten(jax.device_get(run.load("dit", jnp.bfloat16))))
    with watching(monkeypatch) as watch:
        got = run.load("dit", jnp.bfloat16, shardings)
    assert watch.peak <= 3.1 * shard_bytes(got), "the base in bf16, and what was trained in float32"
    where = dict(flatten(shardings))
    for path, leaf in flatten(got):
        assert leaf.sharding.is_equivalent_to(where[path], leaf.ndim), path
        # A B is summed in another order: a step of bf16 at most
        rtol = 0 if lora is None else 2**-7
        np.testing.assert_allclose(*(np.asarray(a, np.float32) for a in (leaf, want[path])), rtol=rtol, err_msg=path)

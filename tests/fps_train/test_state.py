"""What is held in which dtype, and of what there are masters, moments and an average."""

import functools

import jax
import jax.numpy as jnp
import pytest

from fps_jax.models.dit import build_dit
from fps_jax.models.lora import LoRAConfig
from fps_jax.models.params import abstract_params, flatten
from fps_train.config import OptimizerOptions
from fps_train.state import Parts, init_state
from tests.fps_train.models import CONFIG

WHOLE = {path: leaf.shape for path, leaf in flatten(abstract_params(build_dit(CONFIG)))}
MODES = {
    "full": Parts(CONFIG, "bfloat16"),
    "lora": Parts(CONFIG, "bfloat16", LoRAConfig(rank=2, alpha=4.0, targets=("blocks/self_attn/q",))),
    "train_only": Parts(CONFIG, "bfloat16", train_only=("self_attn/*", "head/*")),
}
TRAINED = {
    "full": set(WHOLE),
    "lora": {"blocks/self_attn/q/lora_a", "blocks/self_attn/q/lora_b"},
    "train_only": {path for path in WHOLE if "self_attn/" in path or path.startswith("head/")},
}


def begun(mode, kind, read):
    """Shapes of (state, frozen) of a run whose weights were read in dtype `read`."""
    parts, options = MODES[mode], OptimizerOptions(kind=kind, ema=0.99)
    weights = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, read), abstract_params(build_dit(CONFIG)))
    trained, frozen = jax.eval_shape(lambda params: parts.split(params, jax.random.key(0)), weights)
    return jax.eval_shape(functools.partial(init_state, options=options, num_steps=10), trained), frozen


@pytest.mark.parametrize("read", [jnp.float32, jnp.bfloat16], ids=["float32", "bf16"])
@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("mode", MODES)
def test_masters_moments_and_average_are_float32_and_of_what_is_trained_alone(mode, kind, read):
    state, frozen = begun(mode, kind, read)
    trained = dict(flatten(state.params))
    assert set(trained) == TRAINED[mode]
    assert dict(flatten(state.ema)).keys() == trained.keys()
    moments = [
        leaf for leaf in jax.tree.leaves(state.optimizer) if jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.ndim
    ]
    assert {leaf.dtype for leaf in [*trained.values(), *jax.tree.leaves(state.ema), *moments]} == {jnp.dtype("float32")}
    size = sum(leaf.size for leaf in trained.values())
    matrices = sum(
        leaf.size for path, leaf in trained.items() if path.startswith("blocks/") and path.endswith("/kernel")
    )
    # Muon has one momentum where Adam has two, and the three coefficients of its polynomial.
    assert sum(leaf.size for leaf in moments) == 2 * size - (matrices - 3 if kind == "muon" else 0)
    if mode != "lora":
        assert set(dict(flatten(frozen))) == set(WHOLE) - TRAINED[mode]


@pytest.mark.parametrize("mode", ["lora", "train_only"])
def test_what_is_frozen_is_held_in_the_compute_dtype_but_for_what_the_model_computes_in_float32(mode):
    _, frozen = begun(mode, "adamw", jnp.float32)
    leaves = dict(flatten(frozen))
    assert {path: leaf.shape for path, leaf in leaves.items()} == {
        path: shape for path, shape in WHOLE.items() if mode == "lora" or path not in TRAINED[mode]
    }
    float32 = {path for path, leaf in leaves.items() if leaf.dtype == jnp.float32}
    assert {leaf.dtype for path, leaf in leaves.items() if path not in float32} == {jnp.dtype("bfloat16")}
    by_design = {
        path
        for path in leaves
        if path.split("/")[0] in ("time_embedding", "time_projection", "head") or "modulation" in path or "norm" in path
    }
    assert float32 == by_design
    assert all(path in leaves and path not in float32 for path in ("patch_embedding/kernel", "blocks/mlp/up/kernel"))

"""Adapters beside frozen weights: what they compute, what they are made of, and what their gradient never computes."""

import dataclasses
import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from fps_jax.models.dit import build_dit, cast_params, dit
from fps_jax.models.lora import LoRAConfig, init_lora, linear_layers, merge_lora, target_layers, with_lora
from fps_jax.models.params import abstract_params, bind, flatten, unflatten
from tests.checkpoints import TINY, TINY_I2V, tiny_dit
from tests.reference import golden, rel_l2

LORA = LoRAConfig(rank=3, alpha=5.0)
EVERYWHERE = dataclasses.replace(LORA, targets=("*",))


def inputs():
    g = golden("dit_t2v_single")
    return jnp.asarray(g["in.x0"])[None], jnp.asarray(g["in.t"], jnp.float32), jnp.asarray(g["in.context0"])[None]


def random_adapters(lora: LoRAConfig = LORA):
    """Adapters whose B isn't zero: what training makes of them."""
    rng, leaves = np.random.default_rng(1), {}
    for path, (*stack, d_in, d_out) in target_layers(TINY, lora).items():
        leaves[f"{path}/lora_a"] = rng.normal(0, d_in**-0.5, (*stack, d_in, lora.rank)).astype(np.float32)
        leaves[f"{path}/lora_b"] = rng.normal(0, 0.2, (*stack, lora.rank, d_out)).astype(np.float32)
    return jax.tree.map(jnp.asarray, unflatten(leaves))


def weights_with(base, adapters, scale):
    """W + scale A B, by definition."""
    leaves = dict(flatten(base))
    pairs = dict(flatten(adapters))
    for path in leaves:
        name = path.removesuffix("/kernel")
        if f"{name}/lora_a" in pairs:
            leaves[path] = leaves[path] + scale * (pairs[f"{name}/lora_a"] @ pairs[f"{name}/lora_b"])
    return unflatten(leaves)


def apply(params, remat="none", dtype=jnp.float32):
    return dit(TINY, params, *inputs(), remat=remat, dtype=dtype).velocity


velocity = jax.jit(apply)
# XLA may leave out roundings to bf16, as suits each program (xla_allow_excess_precision); here it has to do all of them.
velocity_bf16 = jax.jit(
    functools.partial(apply, dtype=jnp.bfloat16), compiler_options={"xla_allow_excess_precision": False}
)


@pytest.fixture(scope="module")
def base():
    return jax.tree.map(jnp.asarray, tiny_dit())


def test_adapters_are_float32_with_a_layer_axis_and_start_at_nothing():
    adapters = dict(flatten(init_lora(TINY, LORA, jax.random.key(7))))
    attentions = {f"blocks/{part}/{name}" for part in ("self_attn", "cross_attn") for name in "qkvo"}
    assert {path.rpartition("/")[0] for path in adapters} == attentions | {"blocks/mlp/up", "blocks/mlp/down"}
    assert {leaf.dtype for leaf in adapters.values()} == {jnp.dtype(jnp.float32)}
    assert adapters["blocks/mlp/up/lora_a"].shape == (3, 64, 3)
    assert adapters["blocks/mlp/up/lora_b"].shape == (3, 3, 128)
    for path, leaf in adapters.items():
        if path.endswith("lora_b"):
            assert not leaf.any()
        else:
            bound = leaf.shape[-2] ** -0.5
            assert 0.9 * bound < float(jnp.abs(leaf).max()) <= bound
            np.testing.assert_allclose(leaf.std(), bound / 3**0.5, rtol=0.1)  # uniform's; 576 numbers or more
            assert not np.array_equal(leaf[0], leaf[1])


def test_an_adapters_numbers_depend_on_its_own_path_alone():
    few = init_lora(TINY, dataclasses.replace(LORA, targets=("head/proj", "mlp/up")), jax.random.key(7))
    assert [path for path, _ in flatten(few)] == [
        "blocks/mlp/up/lora_a", "blocks/mlp/up/lora_b", "head/proj/lora_a", "head/proj/lora_b",
    ]  # fmt: skip
    many = init_lora(TINY, LORA, jax.random.key(7))
    np.testing.assert_array_equal(few["blocks"]["mlp"]["up"]["lora_a"], many["blocks"]["mlp"]["up"]["lora_a"])


@pytest.mark.parametrize(
    ("pattern", "paths"),
    [
        ("q", {"blocks/self_attn/q", "blocks/cross_attn/q"}),
        ("cross_attn/?_img", {"blocks/cross_attn/k_img", "blocks/cross_attn/v_img"}),
        ("text_embedding/*", {"text_embedding/up", "text_embedding/down"}),
        ("patch_embedding", {"patch_embedding"}),
    ],
)
def test_targets_are_patterns_over_paths_or_their_ends(pattern, paths):
    assert set(target_layers(TINY_I2V, dataclasses.replace(LORA, targets=(pattern,)))) == paths


def test_a_model_with_new_adapters_is_the_base_to_the_bit(base):
    drawn = flatten(random_adapters(EVERYWHERE))
    adapters = unflatten({p: jnp.zeros_like(leaf) if p.endswith("lora_b") else leaf for p, leaf in drawn})
    np.testing.assert_array_equal(velocity(with_lora(base, adapters, EVERYWHERE)), velocity(base))
    half = cast_params(base, jnp.bfloat16)
    np.testing.assert_array_equal(velocity_bf16(with_lora(half, adapters, EVERYWHERE)), velocity_bf16(half))


def test_merged_and_apart_agree_to_float32(base):
    adapters = random_adapters(EVERYWHERE)
    merged = velocity(merge_lora(base, adapters, EVERYWHERE))
    assert rel_l2(velocity(base), merged) > 1e-2  # the adapters do something
    # CONTRIBUTING.md: the bar for a part in float32
    assert rel_l2(velocity(with_lora(base, adapters, EVERYWHERE)), merged) <= 1e-5


def test_merging_is_w_plus_the_scaled_product_in_float32(base):
    adapters = random_adapters()
    exact = lambda tree: unflatten({path: np.asarray(leaf, np.float64) for path, leaf in flatten(tree)})  # noqa: E731
    for dtype, bar in ((np.float32, 2**-23), (jnp.bfloat16, 2**-8)):  # units in the last place
        hosts = unflatten({p: np.asarray(leaf).astype(dtype) for p, leaf in flatten(base)})
        want = dict(flatten(weights_with(exact(hosts), exact(adapters), 0.5 * 5 / 3)))
        for given, kind in ((jax.tree.map(jnp.asarray, hosts), jax.Array), (hosts, np.ndarray)):
            merged = dict(flatten(merge_lora(given, adapters, LORA, scale=0.5)))
            assert all(isinstance(leaf, kind) and leaf.dtype == dtype for leaf in merged.values())
            assert merged["head/proj/kernel"] is given["head"]["proj"]["kernel"]
            assert not np.array_equal(merged["blocks/mlp/up/kernel"], hosts["blocks"]["mlp"]["up"]["kernel"])
            for path, leaf in merged.items():
                assert np.abs(np.asarray(leaf, np.float64) - want[path]).max() <= bar * np.abs(want[path]).max()


def test_base_and_adapters_are_left_as_they_were(base):
    adapters = random_adapters()
    before = [leaf for _, leaf in flatten(base)], [leaf for _, leaf in flatten(adapters)]
    with_lora(base, adapters, LORA)
    merge_lora(base, adapters, LORA)
    assert all(a is b for a, (_, b) in zip(before[0], flatten(base), strict=True))
    assert all(a is b for a, (_, b) in zip(before[1], flatten(adapters), strict=True))


def test_the_gradient_is_that_through_merged_weights(base):
    adapters = random_adapters()

    def loss(adapters, join, remat):
        with jax.default_matmul_precision("highest"):
            return jnp.square(apply(join(adapters), remat) - inputs()[0]).mean()

    gradient = jax.jit(jax.grad(loss), static_argnums=(1, 2))
    apart = gradient(adapters, lambda a: with_lora(base, a, LORA), "full")
    merged = gradient(adapters, lambda a: weights_with(base, a, 5 / 3), "none")
    for (path, got), (_, want) in zip(flatten(apart), flatten(merged), strict=True):
        assert float(jnp.abs(want).max()) > 0, path
        # Sums over tokens and layers in another order; a part's bar in float32 is 1e-5, a whole pipeline's 1e-4.
        assert rel_l2(got, want) <= 1e-4, path


def products(jaxpr) -> set[tuple[int, ...]]:
    """Shapes of all results of matrix products in a program, loops and calls included."""
    found = set()
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            found |= {var.aval.shape for var in eqn.outvars}
        for inner in jax.extend.core.jaxprs_in_params(eqn.params):
            found |= products(inner)
    return found


@pytest.mark.parametrize("remat", ["none", "full"])
def test_no_gradient_of_a_frozen_weight_is_formed_and_no_merged_weight(base, remat):
    def loss(params, adapters):
        return dit(TINY, with_lora(params, adapters, LORA), *inputs(), remat=remat).velocity.sum()

    adapters = random_adapters()
    kernels = {(64, 64), (64, 128), (128, 64)}
    lora_only = products(jax.make_jaxpr(jax.grad(loss, argnums=1))(base, adapters).jaxpr)
    assert (64, 3) in lora_only  # A's gradient: the search does see products of such shapes
    assert not lora_only & (kernels | {shape[::-1] for shape in kernels})
    assert kernels <= products(jax.make_jaxpr(jax.grad(loss, argnums=0))(base, adapters).jaxpr)


def test_in_bf16_the_masters_stay_float32_and_so_does_their_gradient(base):
    half, adapters = cast_params(base, jnp.bfloat16), random_adapters(EVERYWHERE)
    held = dict(flatten(cast_params(with_lora(base, adapters, EVERYWHERE), jnp.bfloat16)))
    assert held["blocks/self_attn/q/lora_a"].dtype == held["blocks/self_attn/q/lora_b"].dtype == jnp.float32
    assert held["blocks/self_attn/q/kernel"].dtype == jnp.bfloat16
    exact, plain = velocity(with_lora(base, adapters, EVERYWHERE)), velocity(base)
    got = velocity_bf16(with_lora(half, adapters, EVERYWHERE))
    bar = 2 * rel_l2(velocity_bf16(half), plain)  # twice what bf16 costs without adapters
    assert 0 < rel_l2(got, exact) <= bar
    loss = lambda a: apply(with_lora(half, a, EVERYWHERE), dtype=jnp.bfloat16).sum()  # noqa: E731
    gradient = jax.eval_shape(jax.grad(loss), adapters)
    assert {leaf.dtype for _, leaf in flatten(gradient)} == {jnp.dtype(jnp.float32)}


def test_a_model_built_without_adapters_has_no_place_in_its_parameters():
    assert not [path for path, _ in flatten(abstract_params(build_dit(TINY))) if "lora" in path]
    assert linear_layers(TINY)["blocks/mlp/down"] == (3, 128, 64)


BAD_CONFIGS = [
    ({"rank": 0}, "rank=0 of a LoRA is not a whole number of at least 1"),
    ({"rank": 2.0}, "rank=2.0 of a LoRA"),
    ({"alpha": 0.0}, "alpha=0.0 of a LoRA is not a positive number"),
    ({"alpha": float("nan")}, "alpha=nan of a LoRA"),
    ({"targets": ()}, "targets=\\(\\) of a LoRA is not a list of patterns"),
    ({"targets": "q"}, "targets='q' of a LoRA"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_CONFIGS)
def test_a_wrong_config_says_what_is_wrong(changes, message):
    with pytest.raises(ValueError, match=message):
        LoRAConfig(**({"rank": 4, "alpha": 4.0} | changes))


def test_a_target_that_matches_nothing_lists_what_there_is():
    with pytest.raises(
        ValueError, match=r"LoRA target 'to_q' matches no linear layer; there are blocks/cross_attn/k, "
    ):
        init_lora(TINY, dataclasses.replace(LORA, targets=("q", "to_q")), jax.random.key(0))


def test_a_rank_above_the_matrix_is_an_error():
    with pytest.raises(ValueError, match="rank=65 of a LoRA is above blocks/cross_attn/k's own, 64"):
        init_lora(TINY, dataclasses.replace(LORA, rank=65), jax.random.key(0))


def test_adapters_of_another_model_or_place_are_refused(base):
    adapters = random_adapters()
    wrong = unflatten({path: leaf[:2] for path, leaf in flatten(adapters)})
    for join in (with_lora, merge_lora):
        with pytest.raises(ValueError, match=r"adapter 'blocks/cross_attn/k' has shapes \[2, 64, 3\].*another model"):
            join(base, wrong, LORA)
        with pytest.raises(ValueError, match="adapter 'blocks/norm' needs lora_a, lora_b and a kernel"):
            join(base, {"blocks": {"norm": {"lora_a": jnp.zeros((3, 64, 3))}}}, LORA)
        up = adapters["blocks"]["mlp"]["up"] | {"bias": jnp.zeros(3)}
        with pytest.raises(ValueError, match="'blocks/mlp/up/bias' is no part of an adapter"):
            join(base, {"blocks": {"mlp": {"up": up}}}, LORA)
    leaves = dict(flatten(base)) | {"blocks/self_attn/norm_q/lora_a": jnp.zeros(3)}
    with pytest.raises(ValueError, match="adapter at 'blocks/self_attn/norm_q/lora_a', where this model has no linear"):
        bind(build_dit(TINY), unflatten(leaves))

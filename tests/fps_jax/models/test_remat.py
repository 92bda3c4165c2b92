"""What a gradient keeps and what it computes again, counted in its program. That it is the same gradient: test_dit.py."""

from collections import Counter
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from fps_jax import AttentionPlan
from fps_jax.attention import attend
from fps_jax.attention.attend import DenseAttention, PlannedAttention
from fps_jax.models.dit import cast_params, dit
from tests.checkpoints import TINY, tiny_dit

GRID = (3, 4, 4)
PLAN = AttentionPlan.build(GRID, window=(1, 2, 2))
ATTENTION = {"dense": DenseAttention(), "fps with a dense layer": PlannedAttention(PLAN, dense_layers=(0,))}


def loss(params, remat, attention, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    latents = jnp.asarray(rng.standard_normal((1, 16, 3, 8, 8), np.float32))
    text = jnp.asarray(rng.standard_normal((1, 7, 32), np.float32))
    velocity = dit(
        TINY, params, latents, jnp.array([500.0]), text, dtype=dtype, remat=remat, attention=attention
    ).velocity
    return jnp.square(velocity).mean()


def equations(jaxpr) -> Iterator:
    """All of a program, loops' and branches' own included, once each."""
    for equation in jaxpr.eqns:
        yield equation
        for parameter in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda p: hasattr(p, "eqns")):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def counted(remat, attention, dtype=jnp.float32) -> Counter:
    gradient = jax.grad(lambda params: loss(params, remat, attention, dtype))
    program = jax.make_jaxpr(gradient)(cast_params(jax.tree.map(jnp.asarray, tiny_dit()), dtype)).jaxpr
    return Counter(equation.primitive.name for equation in equations(program))


# Exponentials of the forward of each: dense attention has one, `portable` too for so few tokens. The backward has one of its own.
@pytest.mark.parametrize(("attention", "own"), [("dense", 1), ("fps with a dense layer", 1 + 1)])
def test_with_remat_attention_the_forward_of_self_attention_runs_once(attention, own):
    exps = {remat: counted(remat, ATTENTION[attention])["exp"] for remat in ("none", "attention", "dots", "full")}
    cross = 1
    # Text's is computed again: it costs little, and keeping it as much as this
    assert exps["attention"] == exps["none"] + cross
    assert exps["full"] == exps["none"] + own + cross
    assert exps["dots"] == exps["full"]


def test_with_remat_attention_cudnns_forward_runs_once(monkeypatch):
    """It is traced as for a GPU, not run."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(attend, "target_platform", lambda: "gpu")
    forwards = {
        remat: counted(remat, ATTENTION["dense"], jnp.bfloat16)["dot_product_attention_fwd_wrapper"]
        for remat in ("none", "attention", "full")
    }
    assert forwards == {"none": 2, "attention": 2, "full": 4}  # self- and cross-attention


@pytest.mark.parametrize("remat", ["none", "attention", "dots", "full"])
def test_no_gradient_keeps_scores(remat):
    """Nothing that a loop hands to the backward has as many elements as the scores of self-attention in all layers and heads."""
    gradient = jax.grad(lambda params: loss(params, remat, ATTENTION["dense"]))
    program = jax.make_jaxpr(gradient)(jax.tree.map(jnp.asarray, tiny_dit())).jaxpr
    scores = (GRID[0] * GRID[1] * GRID[2],) * 2
    kept = [v.aval.shape for e in equations(program) if e.primitive.name == "scan" for v in e.outvars]
    assert kept
    assert not [shape for shape in kept if shape[-2:] == scores]

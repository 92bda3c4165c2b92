"""The product of a linear layer: on a CPU gradients in 16 bits are summed in float32, and all else is `lax.dot_general`'s."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from fps_jax.models import linear
from tests.fps_jax.models.test_remat import ATTENTION, counted, equations
from tests.reference import rel_l2

DIMENSIONS = (((2,), (0,)), ((), ()))


def operands(dtype):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in ((2, 300, 24), (24, 16), (2, 300, 16))]


def gradients(product, x, w, d_out):
    out, vjp = jax.vjp(lambda x, w: product(x, w, DIMENSIONS), x, w)
    return out, *vjp(d_out)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_in_16_bits_gradients_are_rounded_once_and_the_product_keeps_its_bits(dtype):
    x, w, d_out = operands(dtype)
    out, dx, dw = gradients(linear._dot_general, x, w, d_out)
    assert np.array_equal(out, lax.dot_general(x, w, DIMENSIONS))
    assert (dx.dtype, dw.dtype) == (dtype, dtype)
    xs, ws, ds = (np.asarray(a, np.float64) for a in (x, w, d_out))
    # But for middles that float32's sum lies on the other side of
    assert rel_l2(dx, (ds @ ws.T).astype(dx.dtype)) <= 1e-4
    assert rel_l2(dw, np.einsum("bsi,bso->io", xs, ds).astype(dw.dtype)) <= 1e-4


def dots(product, dtype):
    x, w, d_out = operands(dtype)
    program = jax.make_jaxpr(lambda *a: gradients(product, *a))(x, w, d_out).jaxpr
    # The wider of both operands
    return [
        max((str(v.aval.dtype) for v in e.invars), key=lambda dtype: jnp.dtype(dtype).itemsize)
        for e in equations(program)
        if e.primitive.name == "dot_general"
    ]


def test_only_a_cpu_has_it(monkeypatch):
    """What a weight's gradient is made of decides: of bf16 it takes ten times float32's time."""
    assert dots(linear._dot_general, "bfloat16")[1:] == ["float32"] * 2
    monkeypatch.setattr(linear, "target_platform", lambda: "gpu")
    assert dots(linear._dot_general, "bfloat16") == ["bfloat16"] * 3


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_what_a_gradient_computes_again_is_the_same_in_16_bits(remat):
    kinds = {
        dtype: counted(remat, ATTENTION["dense"], jnp.dtype(dtype))["dot_general"] for dtype in ("float32", "bfloat16")
    }
    assert kinds["float32"] == kinds["bfloat16"]

"""The straight-through rule of FP8 attention, held against its alternatives.

    python -m benchmarks.straight_through     # a minute for the layer, some three more for each rule that is trained

Adding one vector to all keys changes nothing in exact attention, so dq must not see it: rows of dS sum to 0. Rounding P breaks
that, or not, by what the backward takes for P and for the output in delta = rowsum(dO * O). The rules:

  unrounded   P un-rounded in dS and dV, the returned output
  rounded     P as the forward rounded it in both, the returned output
  mixed       P rounded in dV and un-rounded in dS, the returned output
  split       P rounded in dS and un-rounded in dV, the returned output
  attn-qat    as mixed, with the output of un-rounded P in delta (Attn-QAT, arXiv 2603.00040): a second output to compute and keep

1. One layer: 256 tokens, 2 heads of 64, Gaussian q, k, v and dO, logits of deviation 2, a scale for 64 tokens, keys with a common
   component of a given size (of their own deviations). Sum of a row of dS by the sum of its magnitudes; gradients against those of
   exact attention, relative L2. Each also with `center_k`: K minus its mean over tokens before it is rounded.
2. A short training run of a DiT (2 layers, width 64, 64 tokens) on moving blobs, from one start and on the same batches: mean loss
   of the last tenth, for keys without and with a common component (the bias of every k set to 4, which RMS norm and RoPE follow).
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.record import write
from fps_jax.attention.attend import TokenAttention
from fps_jax.config import DiTConfig
from fps_jax.models.dit import dit
from fps_jax.models.init import init_dit_for_training
from pallas_kernels.reference import FP8_MAX, fake_quant, fake_quant_values, nearest_fp8, row_top

RULES = ("unrounded", "rounded", "mixed", "split", "attn-qat")
TOKENS, HEADS, HEAD_DIM, SEEDS = 256, 2, 64, 8
COMMON = (0.0, 1.0, 4.0, 16.0)


def _products(q, k):
    return jnp.einsum("bqnh,bknh->bnqk", q, k) * q.shape[-1] ** -0.5


def _rounded_p(scores):
    """(P rounded and its sum, P un-rounded and its sum), both before they are divided."""
    p = jnp.exp(scores - row_top(scores.max(-1, keepdims=True)))
    p8 = nearest_fp8(p * FP8_MAX) / FP8_MAX
    return p8 / p8.sum(-1, keepdims=True), p, p8.sum(-1, keepdims=True)


def _core(q, k, v):
    p8, _, _ = _rounded_p(_products(q, k))
    return jnp.einsum("bnqk,bknh->bqnh", p8, v)


def score_gradients(rule: str, q, k, v, d_out):
    """(P of dV, dS) by a rule, of dequantized operands."""
    p8, p, total = _rounded_p(_products(q, k))
    by_total, exact = p / total, p / p.sum(-1, keepdims=True)
    d_p = jnp.einsum("bqnh,bknh->bnqk", d_out, v)
    delta = (p8 * d_p).sum(-1, keepdims=True)  # rowsum(dO * O)
    if rule == "unrounded":
        return by_total, by_total * (d_p - delta)
    if rule == "rounded":
        return p8, p8 * (d_p - delta)
    if rule == "split":
        return by_total, p8 * (d_p - delta)
    if rule == "mixed":
        return p8, by_total * (d_p - delta)
    return p8, exact * (d_p - (exact * d_p).sum(-1, keepdims=True))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ruled(rule, q, k, v):
    return _core(q, k, v)


def _ruled_backward(rule, saved, d_out):
    q, k, v = saved
    p, d_scores = score_gradients(rule, q, k, v, d_out)
    d_scores = d_scores * q.shape[-1] ** -0.5
    return (
        jnp.einsum("bnqk,bknh->bqnh", d_scores, k),
        jnp.einsum("bnqk,bqnh->bknh", d_scores, q),
        jnp.einsum("bnqk,bqnh->bknh", p, d_out),
    )


_ruled.defvjp(lambda rule, q, k, v: (_core(q, k, v), (q, k, v)), _ruled_backward)


def attention(q, k, v, *, rule: str, center: bool, tokens_per_scale: int = 64):
    """FP8 attention of all pairs of tokens with the gradient of `rule`."""
    if center:
        k = k - k.mean(1, keepdims=True)
    quant = functools.partial(fake_quant, tokens_per_scale=tokens_per_scale)
    return _ruled(rule, quant(q), quant(k), fake_quant_values(v))


def exact(q, k, v):
    return jnp.einsum("bnqk,bknh->bqnh", jax.nn.softmax(_products(q, k), axis=-1), v)


def one_layer() -> dict[str, Any]:
    @functools.partial(jax.jit, static_argnames=("rule", "center"))
    def measured(q, k, v, d_out, *, rule, center):
        want, want_back = jax.vjp(exact, q, k, v)
        got, back = jax.vjp(functools.partial(attention, rule=rule, center=center), q, k, v)
        kc = k - k.mean(1, keepdims=True) if center else k
        quant = functools.partial(fake_quant, tokens_per_scale=64)
        _, d_scores = score_gradients(rule, quant(q), quant(kc), fake_quant_values(v), d_out)
        rows = jnp.abs(d_scores.sum(-1)) / jnp.abs(d_scores).sum(-1)
        errors = [
            jnp.linalg.norm(a - b) / jnp.linalg.norm(b) for a, b in zip(back(d_out), want_back(d_out), strict=True)
        ]
        return rows.mean(), jnp.linalg.norm(got - want) / jnp.linalg.norm(want), *errors

    table = {}
    for common in COMMON:
        for rule in RULES:
            for center in (False, True):
                found = []
                for seed in range(SEEDS):
                    rng = np.random.default_rng(seed)
                    q, k, v, d_out = (
                        rng.standard_normal((1, TOKENS, HEADS, HEAD_DIM)).astype(np.float32) for _ in range(4)
                    )
                    shift = common * rng.choice([-1.0, 1.0], (1, 1, HEADS, HEAD_DIM)).astype(np.float32)
                    found.append([float(x) for x in measured(2 * q, k + shift, v, d_out, rule=rule, center=center)])
                names = ("row_sum_of_dS", "output", "dq", "dk", "dv")
                line = dict(zip(names, (float(f"{x:.3g}") for x in np.mean(found, 0)), strict=True))
                table[f"common {common:g}, {rule}{', center_k' if center else ''}"] = line
                print(common, rule, center, line, flush=True)
    return table


CONFIG = DiTConfig(
    task="t2v", dim=64, mlp_dim=128, num_heads=2, num_layers=2, text_dim=16, text_len=2, freq_dim=64, in_channels=4, out_channels=4
)  # fmt: skip
BATCH, STEPS, BIASES, TRAINING_SEEDS = 16, 300, (0.0, 4.0), 2


@dataclass(frozen=True)
class Ruled(TokenAttention):
    """A DiT's self-attention by a rule; None: exact."""

    rule: str | None
    center: bool = False
    layout: None = None

    def __call__(self, q, k, v, /, *, layer, taps):
        if self.rule is None:
            return exact(q, k, v)
        return attention(q, k, v, rule=self.rule, center=self.center, tokens_per_scale=16)


def blobs(key):
    """Latents `[B, 4, 4, 8, 8]`: a bump of random place, speed and colour, normalised."""
    place, speed, colour = jax.random.split(key, 3)
    at = jax.random.uniform(place, (BATCH, 2, 1, 1, 1), minval=1, maxval=7)
    at = at + jax.random.uniform(speed, (BATCH, 2, 1, 1, 1), minval=-1, maxval=1) * jnp.arange(4.0).reshape(
        1, 1, 4, 1, 1
    )
    y, x = jnp.arange(8.0).reshape(1, 1, 8, 1), jnp.arange(8.0).reshape(1, 1, 1, 8)
    bump = jnp.exp(-(jnp.square(y - at[:, 0]) + jnp.square(x - at[:, 1])) / 4)
    return jax.random.normal(colour, (BATCH, 4, 1, 1, 1)) * bump[:, None] * 3


@functools.partial(jax.jit, static_argnums=0)
@functools.partial(jax.vmap, in_axes=(None, 0, 0))
def losses(attention_rule: Ruled, seed, common):
    """The loss of every step."""
    key = jax.random.key(seed)
    params = init_dit_for_training(CONFIG, key)
    bias = params["blocks"]["self_attn"]["k"]["bias"]
    signs = jax.random.rademacher(jax.random.fold_in(key, 100), bias.shape, jnp.float32)
    params["blocks"]["self_attn"]["k"]["bias"] = common * signs
    rule = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(2e-3, b2=0.99))
    text = jnp.zeros((BATCH, 2, 16))

    def loss(params, key):
        data, noise, time = jax.random.split(key, 3)
        x0 = blobs(data)
        e = jax.random.normal(noise, x0.shape)
        sigma = jax.random.uniform(time, (BATCH,))
        s = sigma.reshape(-1, 1, 1, 1, 1)
        velocity = dit(CONFIG, params, (1 - s) * x0 + s * e, 1000 * sigma, text, attention=attention_rule).velocity
        return jnp.square(velocity - (e - x0)).mean()

    def step(carry, i):
        params, moments = carry
        value, grads = jax.value_and_grad(loss)(params, jax.random.fold_in(key, i))
        updates, moments = rule.update(grads, moments, params)
        return (optax.apply_updates(params, updates), moments), value

    return jax.lax.scan(step, (params, rule.init(params)), jnp.arange(STEPS))[1]


def training() -> Iterator[dict[str, Any]]:
    cases = list(itertools.product(BIASES, range(TRAINING_SEEDS)))
    seeds, biases = jnp.array([seed for _, seed in cases]), jnp.array([bias for bias, _ in cases])
    kinds = [Ruled(None), *(Ruled(rule) for rule in RULES), *(Ruled(rule, True) for rule in RULES[:2])]
    table = {}
    for kind in kinds:
        last = np.asarray(losses(kind, seeds, biases), np.float64)[:, -STEPS // 10 :].mean(1)
        name = "exact attention" if kind.rule is None else kind.rule + (", center_k" if kind.center else "")
        for bias in BIASES:
            own = [round(float(x), 5) for x, (b, _) in zip(last, cases, strict=True) if b == bias]
            table[f"bias of k {bias:g}, {name}"] = {"loss": round(float(np.mean(own)), 5), "of_each_seed": own}
            print(name, bias, own, flush=True)
        yield table


def main() -> None:
    record = {
        "claim": "rows of dS sum to zero where the backward's P is that of the forward",
        "case": f"{TOKENS} tokens, {HEADS} heads of {HEAD_DIM}, {SEEDS} seeds; training: {STEPS} steps, batch {BATCH}, "
        f"{TRAINING_SEEDS} seeds",
        "one_layer": one_layer(),
    }
    write("straight_through", record)
    for table in training():  # minutes a rule: what is there is kept
        write("straight_through", {**record, "training": table})


if __name__ == "__main__":
    main()

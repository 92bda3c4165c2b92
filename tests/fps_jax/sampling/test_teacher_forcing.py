"""Rollouts against forwards of whole videos under masks that are written out here, frame by frame, with attention of all pairs.

Sizes, blocks and times are others than those of the original's runs.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

from fps_jax.attention.attend import TokenAttention
from fps_jax.attention.cache import CacheLayout
from fps_jax.causal import CausalConfig
from fps_jax.models.dit import dit
from fps_jax.models.params import flatten, unflatten
from fps_jax.models.rope import rope_table
from fps_jax.sampling import rollout
from fps_jax.sampling.guidance import guided_velocity
from fps_jax.sampling.rollout import Rollout
from tests.checkpoints import TINY, tiny_dit
from tests.fps_jax.sampling.test_rollout import draws, some_text
from tests.reference import rel_l2

SPACE = (3, 4)  # tokens of a frame


def begin(causal: CausalConfig, num_frames=None, text=1) -> Rollout:
    layout = CacheLayout.build(causal, SPACE, num_frames=num_frames, tile=(causal.slot_frames, 3, 2))
    kv = rollout.text_kv(TINY, tiny_dit(), jnp.asarray(some_text(text)), dtype=jnp.float32)
    return Rollout(TINY, tiny_dit(), kv, layout)


def roll(made: Rollout, blocks: int, first=0) -> np.ndarray:
    steps = len(made.causal.steps)
    parts = [np.asarray(made.block(*draws(i, made.next_shape(), steps))) for i in range(first, first + blocks)]
    return np.concatenate(parts, axis=2)


@pytest.fixture
def calls(monkeypatch):
    """(x, velocity) of each call of the model while the test runs."""
    seen: list[tuple[np.ndarray, np.ndarray]] = []

    def record(config, params, inputs, x, *args, **kwargs):
        out = guided_velocity(config, params, inputs, x, *args, **kwargs)
        jax.debug.callback(lambda x, v: seen.append((np.asarray(x), np.asarray(v))), x, out.velocity, ordered=True)
        return out

    monkeypatch.setattr(rollout, "guided_velocity", record)
    own = jax.jit(functools.partial(rollout.denoise_block), static_argnames=rollout._STATIC)
    monkeypatch.setattr(rollout, "_denoise_block", own)
    return seen


@dataclasses.dataclass(frozen=True)
class Masked(TokenAttention):
    """All pairs of tokens, in raster order, but for what a mask of frames hides.

    fixed: of the tokens, those that have other keys and values than their own: `others`, `[L, 1, S, N, H]`.
    """

    sees: Array
    fixed: Array
    others: tuple[Array, Array]
    layout: None = None

    def __call__(self, q, k, v, /, *, layer, taps):
        of = self.fixed[:, None, None]
        k, v = (jnp.where(of, other[layer], own) for other, own in zip(self.others, (k, v), strict=True))
        taps["k"], taps["v"] = k, v
        scores = jnp.einsum("bqnh,bknh->bnqk", q, k) * q.shape[-1] ** -0.5
        return jnp.einsum("bnqk,bknh->bqnh", jax.nn.softmax(jnp.where(self.sees, scores, -jnp.inf)), v)


@jax.jit
def _masked(latents, times, text, rope, sees, fixed, others):
    taps = {}
    attention = Masked(sees, fixed, others)
    out = dit(TINY, tiny_dit(), latents, times, text, rope=rope, attention=attention, attention_taps=taps)
    return out.velocity, (taps["k"], taps["v"])


def masked(sees, latents, times, text, frames, fixed=(), others=None):
    """(velocity, keys and values) of latents whose frames are told `times`, and are the video's `frames`, in one program a length.

    sees: [query frame, key frame]. fixed: frames that have the keys and values of `others`, another such forward.
    """
    tokens = SPACE[0] * SPACE[1]
    rope = jnp.concatenate([rope_table((1, *SPACE), 32, frame) for frame in frames], axis=1)
    sees = np.repeat(np.repeat(sees, tokens, 0), tokens, 1)
    of = np.repeat(np.isin(np.arange(len(frames)), fixed), tokens)
    if others is None:
        others = (jnp.zeros((3, 1, len(of), 2, 32)),) * 2
    return _masked(jnp.asarray(latents), jnp.asarray(times, jnp.float32)[None], text, rope, sees, of, others)


def seen_by(causal: CausalConfig, frames: int) -> np.ndarray:
    """[query frame, key frame] of a clean video."""
    sees = np.zeros((frames, frames), bool)
    for start, end in causal.blocks(frames):
        sees[start:end, list(causal.attended(end))] = True
    return sees


def assert_cached(made: Rollout, keys, frames: int) -> None:
    attended = np.array(made.causal.attended(frames))
    for x, whole in zip((made.cache.k, made.cache.v), keys, strict=True):
        tokens = np.asarray(whole).reshape(3, 1, frames, -1, 2, 32)
        assert rel_l2(made.layout.read(x, frames), tokens[:, :, attended].reshape(3, 1, -1, 2, 32)) <= 2e-6


@pytest.mark.parametrize(("window", "sink", "noise"), [(None, 0, 0.0), (5, 1, 40.0)])
def test_velocities_of_every_step_are_those_of_clean_and_noisy_video_side_by_side(calls, window, sink, noise):
    """Teacher forcing's sequence: a noisy frame sees its own noisy block, and clean frames of blocks before it."""
    causal = CausalConfig(
        frames_per_block=2, window=window, sink=sink, steps=(1000, 500), first_frame_alone=True, context_noise=noise
    )
    frames = 7
    made = begin(causal, frames if window is None else None)
    clean = roll(made, 4)
    jax.effects_barrier()
    assert [x.shape[2] for x, _ in calls] == [1] * 3 + [2] * 9
    of_clean = seen_by(causal, frames)
    own = np.zeros((frames, frames), bool)
    for start, end in causal.blocks(frames):
        own[start:end, start:end] = True
    sees = np.block([[of_clean, np.zeros_like(own)], [of_clean & ~own, own]])
    for step, even in enumerate((1.0, 0.5)):
        time = 1000 * 5 * even / (1 + 4 * even)
        noisy = np.concatenate([x for x, _ in calls[step::3]], axis=2)
        both = np.concatenate([clean, noisy], axis=2)
        velocity, _ = masked(sees, both, [noise] * frames + [time] * frames, some_text(), [*range(frames)] * 2)
        assert rel_l2(np.concatenate([v for _, v in calls[step::3]], axis=2), velocity[:, :, frames:]) <= 1e-5


@pytest.mark.parametrize("window", [None, 4])
def test_all_frames_may_be_moved_by_a_constant(calls, window, monkeypatch):
    """RoPE is relative: the flows are those of frame 0 on."""
    causal = CausalConfig(frames_per_block=2, window=window, steps=(1000, 500))
    flows = []
    for moved in (0, 1000):
        monkeypatch.setattr(
            rollout, "rope_table", lambda grid, size, start, by=moved: rope_table(grid, size, start + by)
        )
        calls.clear()
        made = begin(causal, 8 if window is None else None)
        roll(made, 4)
        jax.effects_barrier()
        flows.append((np.stack([v for _, v in calls]), np.asarray(made.cache.k)))
    (here, keys), (there, moved_keys) = flows
    assert len(here) == 12
    assert rel_l2(there, here) <= 1e-5
    assert rel_l2(moved_keys, keys) > 0.1


def test_given_frames_are_clean_whatever_made_ones_are_told():
    """Their pass is at t = 0, that of made blocks at the context noise."""
    causal = CausalConfig(frames_per_block=2, steps=(1000, 500), context_noise=40.0)
    made = begin(causal, 8)
    given = np.random.default_rng(5).standard_normal((1, 16, 4, 6, 8), np.float32)
    made.give(given)
    latents = np.concatenate([given, roll(made, 2)], axis=2)
    sees = seen_by(causal, 8)
    _, keys = masked(sees, latents, [0] * 4 + [40] * 4, some_text(), range(8))
    assert_cached(made, keys, 8)
    _, noised = masked(sees, latents, [40] * 8, some_text(), range(8))
    assert rel_l2(noised[0], keys[0]) > 1e-4


def test_a_recache_after_eviction_is_a_splice_behind_the_sink():
    """The sink has the first prompt's keys; what is attended behind it is the second's, and sees nothing forgotten."""
    causal = CausalConfig(frames_per_block=2, window=8, sink=2, steps=(1000, 500), context_noise=40.0)
    made = begin(causal)
    latents, since, frames = roll(made, 6), 8, 14
    made.text = begin(causal, text=2).text
    made.recache(latents[:, :, since:], since)
    latents = np.concatenate([latents, roll(made, 1, first=6)], axis=2)
    assert list(causal.attended(frames)) == [0, 1, *range(since, frames)]

    def spliced(sees, noise=40.0):
        times = [noise] * frames
        _, first = masked(seen_by(causal, frames), latents, [40.0] * frames, some_text(), range(frames))
        return masked(sees, latents, times, some_text(2), range(frames), (0, 1), first)[1]

    in_window = seen_by(causal, frames)
    sees = in_window.copy()
    sees[since:, 2:since] = False
    keys = spliced(sees)
    assert_cached(made, keys, frames)
    of = slice(since * 12, None)
    for other in (spliced(in_window), spliced(sees, noise=0.0)):
        assert rel_l2(other[0][:, :, of], keys[0][:, :, of]) > 1e-4


def test_a_nan_in_a_layers_weights_names_the_layer():
    made = begin(CausalConfig(frames_per_block=2, steps=(1000, 500)), 6)
    roll(made, 1)
    whole = made.params
    for path in ("blocks/mlp/down/kernel", "blocks/self_attn/k/kernel"):
        poisoned = dict(flatten(whole))
        poisoned[path] = poisoned[path].copy()
        poisoned[path][1, 0, 0] = np.nan
        made.params = unflatten(poisoned)
        with pytest.raises(FloatingPointError, match="frames 2 to 3, in step 1 of 2, first in block 1; try"):
            roll(made, 1)

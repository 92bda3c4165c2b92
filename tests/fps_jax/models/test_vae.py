"""The VAE against upstream, and that it works chunk by chunk: no growth, no recompiles, no donated inputs."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from fps_jax.config import VAEConfig
from fps_jax.models import vae, vae_layers, vae_tiling
from fps_jax.models.params import abstract_params, bind, flatten, init_params, unflatten
from tests.reference import DATA, golden, rel_l2

TINY = VAEConfig(base_dim=4)
PARITY = 1e-5  # the project's bar for a single part in float32


def diffusers_key(path: str) -> str:
    """Our path -> the key in diffusers' file. Written here a second time: it checks the converter's table, too."""
    path, leaf = path.rsplit("/", 1)
    path = path.replace("/", ".").replace("shortcut", "conv_shortcut")
    path = path.replace("mid_1.qkv", "mid_1.to_qkv").replace("mid_1", "mid_block.attentions.0")
    path = re.sub(r"mid_(\d)", lambda m: f"mid_block.resnets.{int(m[1]) // 2}", path)
    if "down_" in path:
        path = re.sub(r"down_(\d+)", r"down_blocks.\1", path)
        path = re.sub(r"(blocks\.\d+)\.conv$", r"\1.resample.1", path)
    stage_of = re.search(r"up_(\d+)", path)
    if stage_of:
        stage, block = divmod(int(stage_of[1]), 4)  # three residual blocks and an upsampling a stage
        path = path.replace(stage_of[0], f"up_blocks.{stage}." + ("upsamplers.0" if block == 3 else f"resnets.{block}"))
        path = re.sub(r"upsamplers\.0\.conv$", "upsamplers.0.resample.1", path)
    return path + {"kernel": ".weight", "bias": ".bias", "scale": ".gamma"}[leaf]


@pytest.fixture(scope="module")
def params():
    weights = load_file(DATA / "Wan2.1-T2V-tiny-Diffusers" / "vae" / "diffusion_pytorch_model.safetensors")
    leaves = {}
    for path, spec in flatten(abstract_params(vae.build_vae(TINY))):
        weight = weights.pop(diffusers_key(path))
        if path.endswith("kernel"):
            weight = np.moveaxis(weight, (0, 1), (-1, -2))  # [out, in, ...] -> [..., in, out]
        leaves[path] = weight.reshape(spec.shape)
        assert weight.size == np.prod(spec.shape)
    assert not weights
    return unflatten(leaves)


def channel_last(video):
    return np.moveaxis(video, 1, -1)


def random_latents(*shape):
    return np.random.default_rng(3).standard_normal(shape, np.float32)


@pytest.mark.parametrize("case", ["enc_t1", "enc_t5", "enc_t9_b2", "enc_t13"])
def test_encode_agrees_with_upstream(params, case):
    want = golden("vae")
    got = vae.encode(TINY, params, channel_last(want[f"{case}.in.video"]))
    assert got.dtype == np.float32
    assert rel_l2(got, want[f"{case}.out.mu_normalized"]) <= PARITY


@pytest.mark.parametrize("case", ["dec_t1", "dec_t2", "dec_t3_b2", "dec_t4"])
def test_decode_agrees_with_upstream(params, case):
    want = golden("vae")
    got = vae.decode(TINY, params, want[f"{case}.in.z_normalized"])
    assert got.dtype == np.float32
    assert rel_l2(got, channel_last(want[f"{case}.out.video"])) <= PARITY


def test_the_cache_is_what_upstream_keeps(params):
    case = golden("vae")
    z, cache = jnp.moveaxis(jnp.asarray(case["dec_t2.in.z_normalized"]), 1, -1), None
    for frame in range(2):
        _, cache = vae._decode_chunk(TINY, jax.tree.map(jnp.asarray, params), z[:, frame : frame + 1], cache)
    assert cache is not None
    assert len(cache) == 32
    for slot, kept in enumerate(cache):
        assert rel_l2(kept, channel_last(case[f"dec_t2.cache.chunk1.{slot:02d}"])) <= PARITY, slot


@pytest.mark.parametrize("frames", [1, 2, 3, 4])
def test_convolution_on_a_cpu_equals_the_3d_convolution(frames):
    keys = jax.random.split(jax.random.key(0), 3)
    x, past = (jax.random.normal(k, (2, f, 5, 6, 8)) for k, f in zip(keys[:2], (frames, 2), strict=True))
    kernel = jax.random.normal(keys[2], (3, 3, 3, 8, 7))
    got = vae_layers._causal_conv_cpu(x, past, kernel)
    # Toom-Cook amplifies float32's rounding (6e-8) some ten times
    assert rel_l2(got, vae_layers._causal_conv_default(x, past, kernel)) <= 2e-6


def test_a_gpu_gets_the_3d_convolution_and_full_float32():
    specs = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1, 4, 8, 8, 3), (1, 2, 8, 8, 3), (3, 3, 3, 3, 5))]
    lowered = jax.jit(vae_layers.causal_conv).trace(*specs).lower(lowering_platforms=("cuda",)).as_text()
    assert lowered.count("stablehlo.convolution") == 1
    assert "HIGHEST" in lowered


def test_a_sample_does_not_depend_on_its_batch_and_calls_repeat(params):
    z = random_latents(2, 16, 3, 2, 2)
    both = vae.decode(TINY, params, z)
    np.testing.assert_array_equal(both, vae.decode(TINY, params, z))
    np.testing.assert_array_equal(both[1:], vae.decode(TINY, params, z[1:]))
    video = both[:, :5]
    np.testing.assert_array_equal(vae.encode(TINY, params, video)[1:], vae.encode(TINY, params, video[1:]))


def test_frames_are_causal(params):
    z = random_latents(1, 16, 3, 2, 2)
    np.testing.assert_array_equal(vae.decode(TINY, params, z)[:, :5], vae.decode(TINY, params, z[:, :, :2]))


def test_two_programs_do_for_any_length_and_batch(params):
    for jitted, call, inputs in (
        (vae._decode_chunk, vae.decode, [random_latents(b, 16, f, 2, 2) for b, f in ((1, 3), (2, 5))]),
        (
            vae._encode_chunk,
            vae.encode,
            [np.clip(random_latents(b, f, 16, 16, 3), -1, 1) for b, f in ((1, 9), (2, 17))],
        ),
    ):
        jitted.clear_cache()
        for x in inputs:
            call(TINY, params, x)
        assert jitted._cache_size() == 2


def test_device_memory_does_not_grow_with_length(params):
    alive = []

    def progress(done, total):
        alive.append(sum(a.nbytes for a in jax.live_arrays()))

    vae.decode(TINY, params, random_latents(1, 16, 7, 2, 2), progress=progress)
    assert max(alive[2:-1]) == min(alive[2:-1])


def test_inputs_are_not_donated(params):
    z = jnp.asarray(random_latents(1, 16, 3, 2, 2))
    params = jax.tree.map(jnp.asarray, params)
    video = jnp.asarray(vae.decode(TINY, params, z))
    vae.encode(TINY, params, video)
    assert not any(a.is_deleted() for a in jax.tree.leaves((z, video, params)))


def test_parameters_of_another_dtype_are_computed_in_float32(params):
    half = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), params)
    z = random_latents(1, 16, 2, 2, 2)
    rounded = jax.tree.map(lambda a: a.astype(jnp.float32), half)
    np.testing.assert_array_equal(vae.decode(TINY, half, z), vae.decode(TINY, rounded, z))


encode_moments = jax.jit(vae.encode_moments, static_argnums=0)


@pytest.mark.parametrize("frames", [1, 9])
def test_a_whole_clip_gives_what_its_chunks_give(params, frames):
    """The bar is the brief's 1e-6; 9 frames are a first chunk, the first with a cache, and one after it."""
    video = np.tanh(random_latents(2, frames, 16, 16, 3))
    mean, log_variance = encode_moments(TINY, params, video)
    assert mean.shape == log_variance.shape == (2, 16, (frames + 3) // 4, 2, 2)
    assert rel_l2(mean, vae.encode(TINY, params, video)) <= 1e-6
    z = 3 * random_latents(2, 16, (frames + 3) // 4, 2, 2)
    decode = jax.jit(vae.decode_video, static_argnums=0)
    whole = np.asarray(decode(TINY, params, z))
    assert rel_l2(np.clip(whole, -1, 1), vae.decode(TINY, params, z)) <= 1e-6


def test_log_variance_is_that_of_normalised_latents(params):
    video = np.tanh(random_latents(2, 1, 16, 16, 3))
    mean, log_variance = encode_moments(TINY, params, video)
    model = bind(vae.build_vae(TINY), params)
    moments = jax.jit(lambda x: model.quant_conv.pointwise(model.encoder(x, vae_layers.History(None))))(video)
    mu, raw = np.split(np.moveaxis(np.asarray(moments), -1, 1), 2, axis=1)  # upstream's order
    shift, std = (np.array(a, np.float32).reshape(1, 16, 1, 1, 1) for a in (TINY.latents_mean, TINY.latents_std))
    np.testing.assert_allclose(mean * std + shift, mu, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.exp(log_variance / 2) * std, np.exp(raw / 2), rtol=1e-5)


# Both temporal stages at a fraction of the layers.
SMALL = VAEConfig(
    base_dim=4, z_dim=4, dim_mult=(1, 2, 2), num_res_blocks=1, temporal_downsample=(True, True),
    latents_mean=(0.1, 0.2, 0.3, 0.4), latents_std=(1.0, 2.0, 0.5, 1.5),
)  # fmt: skip


@pytest.fixture(scope="module")
def small():
    rng, leaves = np.random.default_rng(0), {}
    for path, spec in flatten(abstract_params(vae.build_vae(SMALL))):
        values = rng.standard_normal(spec.shape, np.float32)
        if path.endswith("kernel"):
            leaves[path] = values / np.float32(np.prod(spec.shape[:-1]) ** 0.5)
        else:
            leaves[path] = np.float32(0.1) * values + np.float32(path.endswith("scale"))
    return unflatten(leaves)


@pytest.mark.slow
def test_gradients_agree_with_finite_differences(small):
    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1))
    def loss(params, video):
        mean, log_variance = vae.encode_moments(SMALL, params, video)
        out = vae.decode_video(SMALL, params, mean + jnp.exp(0.5 * log_variance))
        return jnp.square(out - 0.3).mean()

    point = (small, np.tanh(random_latents(1, 9, 8, 8, 3)))
    _, grads = loss(*point)
    leaves, tree = jax.tree.flatten(point)
    step = np.float32(1e-3)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        direction = [rng.standard_normal(a.shape, np.float32) * np.abs(a).mean() for a in leaves]
        along = sum(float(np.vdot(g, d)) for g, d in zip(jax.tree.leaves(grads), direction, strict=True))
        ends = []
        for h in (step, -step):
            there = tree.unflatten([a + h * d for a, d in zip(leaves, direction, strict=True)])
            ends.append(float(loss(*there)[0]))
        # A loss of 0.8 in float32 is rounded by up to 6e-8, which the step makes 6e-5; curvature is a tenth of a percent at it
        assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(along, rel=3e-3, abs=2e-4)


def test_the_norm_of_zeros_has_a_finite_gradient():
    """Zero latents and biases give zeros to every norm, and |x| has no derivative there."""
    norm = vae_layers.RMSNorm(4)
    x = jnp.zeros((1, 1, 1, 1, 4))
    np.testing.assert_array_equal(norm(x), 0)
    assert np.isfinite(jax.grad(lambda x: norm(x)[..., 0].sum())(x)).all()


def test_a_clip_of_any_length_is_one_program_of_one_size():
    def size(frames):
        def loss(params, video):
            return vae.decode_video(SMALL, params, vae.encode_moments(SMALL, params, video)[0]).sum()

        specs = abstract_params(vae.build_vae(SMALL)), jax.ShapeDtypeStruct((1, frames, 8, 8, 3), jnp.float32)
        return jax.jit(jax.grad(loss)).lower(*specs).as_text().count("stablehlo.convolution")

    assert size(9) == size(17)


def test_a_video_is_clipped_on_request_alone(small):
    bright = unflatten({**dict(flatten(small)), "decoder/conv_out/bias": np.full(3, 9, np.float32)})

    @jax.jit
    def both(z):
        return [vae.decode_video(SMALL, bright, z, clip=clip) for clip in (False, True)]

    far, near = both(jnp.ones((1, 4, 1, 1, 1)))
    assert (far > 1).all()
    assert (near == 1).all()


def test_progress_counts_chunks(params):
    seen = []
    vae.decode(TINY, params, random_latents(2, 16, 3, 2, 2), progress=lambda *step: seen.append(step))
    assert seen == [(i + 1, 6) for i in range(6)]


def test_initial_values_are_float32_and_differ_between_layers():
    build = vae.build_vae(VAEConfig(base_dim=4, dim_mult=(1, 2), num_res_blocks=1, temporal_downsample=(True,)))
    params = dict(flatten(init_params(build, jax.random.key(0))))
    assert {p: (a.shape, a.dtype) for p, a in params.items()} == {
        p: (s.shape, s.dtype) for p, s in flatten(abstract_params(build))
    }
    assert {str(a.dtype) for a in params.values()} == {"float32"}
    assert params["decoder/up_2/time_conv/kernel"].shape == (3, 1, 1, 8, 16)
    assert params["encoder/mid_1/qkv/kernel"].shape == (8, 24)
    first, second = params["encoder/mid_0/conv1/kernel"], params["encoder/mid_0/conv2/kernel"]
    assert rel_l2(first, second) > 1


@pytest.mark.parametrize(("length", "tiles"), [(64, 1), (65, 2), (90, 2), (104, 2), (121, 3), (160, 3), (500, 9)])
def test_tiles_are_of_one_size_overlap_and_weigh_one(length, tiles):
    axis = vae_tiling.plan_axis(length)
    assert len(axis.starts) == tiles
    assert axis.size <= vae_tiling.MAX_TILE
    assert axis.starts[0] == 0
    assert axis.starts[-1] + axis.size == length
    assert all(a + axis.size - b >= vae_tiling.MIN_OVERLAP for a, b in itertools.pairwise(axis.starts))
    total = np.zeros(8 * length)
    for i, start in enumerate(axis.starts):
        total[8 * start : 8 * (start + axis.size)] += axis.weights(i, 8)
    np.testing.assert_allclose(total, 1, rtol=0, atol=1e-6)


def test_one_tile_is_the_whole_frame_exactly(params):
    z = random_latents(1, 16, 2, 2, 2)
    np.testing.assert_array_equal(vae.decode(TINY, params, z, tiling=True), vae.decode(TINY, params, z))


def test_tiles_of_a_smooth_video_are_close_to_the_whole(params, monkeypatch):
    # They differ by what a tile doesn't see (padding, attention); a tile in a wrong place costs 0.5 and more.
    monkeypatch.setattr(vae, "plan_tiles", functools.partial(vae.plan_tiles, max_tile=12, min_overlap=5))
    constant, slope = np.random.default_rng(3).standard_normal((2, 1, 16, 1, 1, 1), np.float32)
    z = np.broadcast_to(constant + 0.05 * slope * np.linspace(-1, 1, 16, dtype=np.float32), (1, 16, 2, 8, 16))
    whole, tiled = vae.decode(TINY, params, z), vae.decode(TINY, params, z, tiling=True)
    assert 0 < rel_l2(tiled, whole) < 0.1
    assert 0 < rel_l2(vae.encode(TINY, params, whole, tiling=True), vae.encode(TINY, params, whole)) < 0.1


def test_tiles_blend_without_a_seam(params, monkeypatch):
    """Tiles that came out as the constants 0, 1, 2, 3 (2 x 2 of them) become ramps from one to the next."""
    tile = itertools.count()

    def constant_chunk(config, params, z, cache):
        value = next(tile) if cache is None else cache  # a tile's chunks come one after the other
        return np.full((1, 1 if cache is None else 4, 8 * z.shape[2], 8 * z.shape[3], 3), value, np.float32), value

    monkeypatch.setattr(vae, "_decode_chunk", constant_chunk)
    video = vae.decode(TINY, params, random_latents(1, 16, 3, 90, 104), tiling=True)[0, 8, :, :, 0]
    np.testing.assert_allclose(video[[0, 0, -1, -1], [0, -1, 0, -1]], [0, 1, 2, 3])
    assert np.abs(np.diff(video, axis=0)).max() <= 2 / (8 * vae_tiling.MIN_OVERLAP) + 1e-6
    assert np.abs(np.diff(video, axis=1)).max() <= 1 / (8 * vae_tiling.MIN_OVERLAP) + 1e-6


def test_tiles_share_their_programs(params, monkeypatch):
    monkeypatch.setattr(vae, "plan_tiles", functools.partial(vae.plan_tiles, max_tile=2, min_overlap=1))
    vae._decode_chunk.clear_cache()
    vae.decode(TINY, params, random_latents(1, 16, 2, 3, 4), tiling=True)
    assert vae._decode_chunk._cache_size() == 2


def test_decode_bytes_grows_with_the_frame_and_fits_a_24_gb_gpu_at_720p():
    config = VAEConfig()
    small, large = vae.decode_bytes(config, 480, 832), vae.decode_bytes(config, 720, 1280)
    assert small < large < 24e9
    assert vae.decode_bytes(config, 64, 64) > 0.5e9  # the parameters alone


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 4, 16, 16, 3), r"num_frames=4, not 4k\+1 .*; use 1$"),
        ((1, 8, 16, 16, 3), r"num_frames=8, not 4k\+1 .*; use 5$"),
        ((1, 5, 20, 16, 3), "height=20, not a multiple of 8; use 16$"),
        ((1, 5, 16, 4, 3), "width=4, not a multiple of 8; use 8$"),
        ((1, 3, 5, 16, 16), r"shape \(1, 3, 5, 16, 16\); pass \[batch, frames, height, width, 3\]"),
        ((5, 16, 16, 3), "pass"),
        ((1, 0, 16, 16, 3), "pass"),
    ],
)
def test_a_video_of_a_wrong_size_is_refused(params, shape, message):
    for call in (vae.encode, vae.encode_moments):
        with pytest.raises(ValueError, match=message):
            call(TINY, params, np.zeros(shape, np.float32))


@pytest.mark.parametrize("shape", [(1, 4, 1, 2, 2), (16, 1, 2, 2), (1, 16, 0, 2, 2)])
def test_latents_of_a_wrong_shape_are_refused(params, shape):
    for call in (vae.decode, vae.decode_video):
        with pytest.raises(ValueError, match=r"latents has shape .*; pass \[batch, 16, frames, height, width\]"):
            call(TINY, params, np.zeros(shape, np.float32))


@pytest.mark.parametrize("split", [(5,), (3, 2), (1, 1, 3)])
def test_a_stream_gives_the_bits_of_the_whole_decode_however_it_is_split(params, split):
    latents = random_latents(1, 16, 5, 4, 4)
    whole = vae.decode(TINY, params, latents)[0]
    stream = vae.DecodeStream(TINY, params)
    parts = [stream.push(part) for part in np.split(latents, np.cumsum(split)[:-1], axis=2)]
    assert [len(part) for part in parts] == [4 * n - 3 * (i == 0) for i, n in enumerate(split)]
    assert np.array_equal(np.concatenate(parts), whole)
    stream.restart()
    assert np.array_equal(stream.push(latents[:, :, :1]), whole[:1])
    with pytest.raises(ValueError, match="a stream decodes one video"):
        stream.push(random_latents(2, 16, 1, 4, 4))

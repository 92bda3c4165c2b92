"""One request: checked without a checkpoint, and filled in by one; the same object all the way down."""

import dataclasses
import pathlib

import numpy as np
import pytest

from fps_jax import FPSSchedule, Regime
from fps_jax.causal import CausalConfig
from fps_jax.config import NEGATIVE_PROMPTS, WAN_FLF2V_14B, WAN_I2V_14B, WAN_T2V_14B, SamplingDefaults
from fps_jax.sampling.request import Request

WHOLE = FPSSchedule(regimes=(Regime(until=1.0),))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"output_type": "gif"}, "output_type='gif' is not one of 'np', 'latent', 'pil'"),
        ({"prompt": []}, "prompt=.* is not a text or a non-empty list of texts"),
        ({"prompt": 3}, "prompt=3 is not a text or a non-empty list of texts"),
        ({"prompt": ["a", 3]}, r"prompt=\['a', 3\] is not a text or a non-empty list of texts"),
        ({"negative_prompt": 3}, "negative_prompt=3 is not None, a text or a list of texts"),
        ({"negative_prompt": [3]}, "negative_prompt has 1 texts for 1 prompts; pass one text, or as many"),
        ({"negative_prompt": ["caf\udce9"]}, "negative_prompt='caf.udce9' is not valid text"),
        ({"height": 32.0}, "height=32.0 is not a whole number"),
        ({"num_frames": "5"}, "num_frames='5' is not a whole number"),
        ({"num_frames": 0}, r"num_frames=0 is not 4k\+1 .*; use 1"),
        ({"height": 40}, r"height=40 is not a positive multiple of 16 .*; use 32"),
        ({"width": 50}, r"width=50 is not a positive multiple of 16 .*; use 48"),
        ({"guidance_scale": float("nan")}, "guidance_scale=nan is not a finite number"),
        ({"guidance_scale": 1e3}, "guidance_scale=1000.0 is not a finite number below 1000"),
        ({"guidance_scale": -1e3}, "guidance_scale=-1000.0 is not a finite number below 1000"),
        ({"guidance_scale": "5"}, "guidance_scale='5' is not a finite number"),
        ({"seed": None}, "seed=None is not a whole number or a list of them"),
        ({"seed": [1.5]}, "seed=1.5 is not a whole number"),
        ({"seed": 2**32}, r"seed=4294967296 is not in \[0, 2\*\*32\)"),
        ({"schedule": 3}, "schedule=3 is not an FPSSchedule, the path of its JSON file or None"),
        ({"negative_prompt": ["a", "b"]}, "negative_prompt has 2 texts for 1 prompts"),
        ({"num_frames": 10}, r"num_frames=10 is not 4k\+1"),
        ({"num_inference_steps": 2.5}, "num_inference_steps=2.5 is not a whole number"),
        ({"num_inference_steps": 0}, "num_inference_steps=0 is less than 1"),
        ({"guidance_scale": float("inf")}, "guidance_scale=inf is not a finite number"),
        ({"flow_shift": 0.0}, "flow_shift=0.0 is not a positive number"),
        ({"solver": "dpm++", "sigma_grid": "diffusers"}, "is not a valid pair"),
        ({"solver": "ddim"}, "solver='ddim' is not one of 'unipc', 'dpm\\+\\+', 'euler', 'lcm'"),
        ({"preset": "turbo"}, "preset='turbo' is not one of 'wan', 'few-step', 'dmd', 'causvid'"),
        ({"sigmas": [1.0, 0.5], "timesteps": [1000, 500]}, "sigmas and timesteps are both given; give one of them"),
        ({"sigmas": []}, r"sigmas=\[\] is not a non-empty list of numbers in \(0, 1\]"),
        ({"sigmas": "1 0.5"}, r"sigmas='1 0.5' is not a non-empty list of numbers in \(0, 1\]"),
        ({"sigmas": [[1.0], [0.5]]}, "is not a non-empty list of numbers"),
        ({"sigmas": [[1.0, 0.5], [0.5]]}, "is not a non-empty list of numbers"),
        ({"sigmas": 0.5}, "sigmas=0.5 is not a non-empty list of numbers"),
        ({"sigmas": [True]}, "is not a non-empty list of numbers"),
        (
            {"sigmas": [1.0, 0.5, 0.0]},
            r"sigmas=\[1, 0.5, 0\]: 0 is not in \(0, 1\]; leave it out: sampling ends there anyway",
        ),
        ({"sigmas": [1000, 500]}, r"1000 is not in \(0, 1\]; sigmas go from 1 down towards 0"),
        ({"sigmas": [1.0, float("nan")]}, r"nan is not in \(0, 1\]"),
        ({"sigmas": [1.0, 0.5, 0.5]}, r"sigmas=\[1, 0.5, 0.5\]: 0.5 and 0.5 don't fall; each must be below the last"),
        ({"sigmas": [1.0, 0.5, 0.5 - 1e-12]}, "0.5 and 0.5 don't fall"),  # equal in float32
        ({"sigmas": [1.0, 0.9999995]}, "1 and 1 don't fall"),  # unipc starts just below 1
        ({"timesteps": [500, 750]}, r"timesteps=\[500, 750\]: 500 and 750 don't fall"),
        ({"timesteps": [1001]}, r"1001 is not in \(0, 1000\]; timesteps go from 1000 down towards 0"),
        (
            {"timesteps": [1000, 3, 2], "flow_shift": 8.0},
            "3 and 2 are the same noise level at flow_shift=8, which has 1000",
        ),
        ({"timesteps": [1000, 500], "flow_shift": 0.0}, "flow_shift=0.0 is not a positive number"),
        ({"sigmas": [1.0, 0.5], "flow_shift": -1.0}, "flow_shift=-1.0 is not a positive number"),
        (
            {"sigmas": [1.0, 0.5], "sigma_grid": "wan"},
            "sigma_grid='wan' has no place where sigmas are given; leave it out",
        ),
        (
            {"sigmas": [1.0, 0.5], "num_inference_steps": 4},
            "num_inference_steps=4 where sigmas are given, 2 of them; leave it out",
        ),
        (
            {"preset": "dmd", "num_inference_steps": 4},
            "4 where preset='dmd' has timesteps of its own, 3 of them; leave it out, or",
        ),
        (
            {"preset": "causvid", "sigma_grid": "diffusers"},
            "has no place where preset='causvid' has timesteps of its own",
        ),
        ({"preset": "few-step", "num_inference_steps": 0}, "num_inference_steps=0 is less than 1"),
        ({"attention": "flash"}, "attention='flash' is not one of 'dense', 'fp8', 'sparse', 'fps'"),
        ({"attention": "dense", "schedule": WHOLE}, "schedule was given, but attention='dense' follows none"),
        (
            {"num_inference_steps": 10**9},
            "num_inference_steps=1000000000 is above 1,000, the number of noise levels in tr",
        ),
        ({"sigmas": list(np.linspace(1, 0.1, 1001))}, "sigmas has 1,001 levels, more than the 1000 of training"),
        (
            {"height": 160000, "width": 160000},
            "height=160000 width=160000 num_frames=81 makes 8,400,000,000 latents, more th",
        ),
        ({"num_frames": 10**9 + 1}, "num_frames=1000000001 is above 16,777,216, more than any video of this model has"),
        ({"width": 16**20}, r"width=10\*\*18 and more is above"),
        ({"flow_shift": 1e6}, "flow_shift=1000000.0 is not a positive number of at most 1000"),
        ({"flow_shift": float("nan")}, "flow_shift=nan is not a positive number"),
        ({"flow_shift": "5"}, "flow_shift='5' is not a positive number"),
        ({"guidance_scale": 1e9}, "guidance_scale=1000000000.0 is not a finite number below 1000"),
        ({"guidance_scale": True}, "guidance_scale=True is not a finite number"),
        ({"prompt": "caf\udce9"}, r"prompt='caf.udce9' is not valid text \(UTF-8\)"),
        ({"negative_prompt": "caf\udce9"}, "negative_prompt='caf.udce9' is not valid text"),
        (
            {"size": "area"},
            "size='area' keeps the aspect of an image, and there is none; pass image, or leave size out",
        ),
        ({"size": "fit", "image": "a.png"}, "size='fit' is not one of 'exact', 'area'"),
        ({"vae_tiling": "no"}, "vae_tiling='no' is not True or False"),
        ({"seed": [1, 2]}, "seed has 2 values for 1 prompts"),
        ({"seed": [-1]}, "seed=-1 is not in"),
        ({"seed": -1, "latents": np.zeros(1)}, "seed=-1 is not in"),  # solvers that add noise need it beside latents
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_what_no_model_can_do_is_refused_without_one(arguments, message):
    with pytest.raises(ValueError, match=message):
        Request(**{"prompt": "x", **arguments})


def test_a_schedules_file_is_read_once(tmp_path):
    path = tmp_path / "schedule.json"
    with pytest.raises(FileNotFoundError, match="doesn't exist; fps-calibrate makes one"):
        Request(prompt="x", attention="fps", schedule=path)
    WHOLE.save(path)
    request = Request(prompt="x", attention="fps", schedule=str(path))
    path.unlink()
    assert dataclasses.replace(request, prompt="y").resolve(WAN_T2V_14B).schedule == WHOLE.resolve((21, 30, 52))


def test_a_model_fills_in_what_the_request_leaves_open():
    small, large = (
        Request(prompt=["a", "b"]),
        Request(prompt="a", height=720, width=1280, num_frames=5, attention="fps"),
    )
    resolved = small.resolve(WAN_T2V_14B)
    assert resolved.prompts == ["a", "b"]
    assert resolved.negatives == [NEGATIVE_PROMPTS["t2v"]] * 2
    assert resolved.latent_shape == (2, 16, 21, 60, 104)
    assert (resolved.grid, resolved.flow_shift) == ((21, 30, 52), 5.0)
    assert len(resolved.table.sigma) == 50
    assert resolved.schedule is None
    assert resolved.segments is None
    resolved = large.resolve(WAN_T2V_14B)
    assert resolved.schedule is not None
    assert resolved.schedule.grid == resolved.grid == (2, 45, 80)
    assert resolved.segments is not None
    assert sum(count for count, _ in resolved.segments) == 50
    image = pathlib.Path("a.png")
    # wan/image2video.py: the lower shift up to 480 x 832 pixels, this size included, in either orientation
    sizes = ((480, 832), 3.0), ((832, 480), 3.0), ((496, 832), 5.0), ((480, 848), 5.0), ((720, 1280), 5.0)
    sizes += (((112, 3568), 5.0),)  # the next larger area
    for size, shift in sizes:
        request = Request(prompt="a", image=image, height=size[0], width=size[1])
        assert request.resolve(WAN_I2V_14B).flow_shift == shift
        assert dataclasses.replace(request, flow_shift=7.0).resolve(WAN_I2V_14B).flow_shift == 7.0


def test_a_model_s_own_sizes_and_walk_hold_where_nothing_is_said():
    own = SamplingDefaults(
        height=48, width=64, num_frames=17, num_inference_steps=12, guidance_scale=2.5, negative_prompt=""
    )
    dit = dataclasses.replace(WAN_T2V_14B.dit, patch_size=(1, 1, 1))
    config = dataclasses.replace(WAN_T2V_14B, dit=dit, sampling=own)
    of_the_grid = dataclasses.replace(WHOLE, grid=(5, 6, 8), tile=None)  # of this model's patches, not of Wan's
    resolved = Request(prompt="a", attention="fps", schedule=of_the_grid).resolve(config)
    assert (resolved.latent_shape, resolved.grid) == ((1, 16, 5, 6, 8), (5, 6, 8))
    assert resolved.negatives == [""]
    assert (resolved.settings.num_inference_steps, resolved.settings.guidance_scale) == (12, 2.5)
    given = Request(prompt="a", height=96, num_inference_steps=3, guidance_scale=4.0, negative_prompt="b")
    resolved = given.resolve(config)
    assert (resolved.latent_shape, resolved.negatives) == ((1, 16, 5, 12, 8), ["b"])
    assert (resolved.settings.num_inference_steps, resolved.settings.guidance_scale) == (3, 4.0)
    # A preset that is asked for is that preset; levels have their own number of steps, and the model's guidance.
    for arguments, steps, guidance in (({"preset": "few-step"}, 4, 1.0), ({"sigmas": (1.0, 0.5)}, 2, 2.5)):
        settings = Request(prompt="a", **arguments).resolve(config).settings
        assert (settings.num_inference_steps, settings.guidance_scale) == (steps, guidance)


def test_a_model_refuses_what_others_could_do():
    image = pathlib.Path("a.png")
    for config, arguments, message in (
        (WAN_T2V_14B, {"image": image}, "image was given, but this is a t2v model"),
        (WAN_I2V_14B, {}, "image is missing, and a i2v model needs it"),
        (
            WAN_I2V_14B,
            {"image": np.zeros((3, 48, 64, 3), np.float32)},
            "image has 3 images for 1 prompts; pass one, or as many",
        ),
        (
            WAN_I2V_14B,
            {"image": ["a.png", "b.png"], "prompt": list("xyz")},
            "image has 2 images for 3 prompts; pass one, or as",
        ),
        (WAN_I2V_14B, {"image": image, "last_image": image}, "last_image was given, but this is an i2v model"),
        (WAN_FLF2V_14B, {"image": image}, "last_image is missing, and a flf2v model needs it"),
        (dataclasses.replace(WAN_T2V_14B, causal=CausalConfig()), {}, r"block after block .*; use fps-stream"),
        (WAN_FLF2V_14B, {"image": image, "last_image": [image] * 2}, "last_image has 2 images for 1 prompts"),
        (WAN_FLF2V_14B, {"num_frames": 1}, "num_frames=1 leaves nothing between"),
        (WAN_T2V_14B, {"latents": np.zeros((1, 16, 21, 60, 100))}, "latents has shape"),
        (
            WAN_T2V_14B,
            {"attention": "fps", "schedule": dataclasses.replace(WHOLE, dense_layers=(40,))},
            "names layer 40",
        ),
        (
            WAN_T2V_14B,
            {"attention": "fps", "schedule": dataclasses.replace(WHOLE, grid=(3, 2, 3))},
            "schedule is for a grid of",
        ),
    ):
        request = Request(**{"prompt": "x", **arguments})
        with pytest.raises(ValueError, match=message):
            request.resolve(config)


def test_timesteps_are_levels_of_the_checkpoints_shift_where_none_is_given():
    request = Request(prompt="x", timesteps=[1000, 3, 2])
    table = request.resolve(dataclasses.replace(WAN_T2V_14B, flow_shift=1.0)).table
    np.testing.assert_allclose(table.sigma[1:], [0.003, 0.002], rtol=1e-6)
    with pytest.raises(ValueError, match="3 and 2 are the same noise level at flow_shift=5"):
        request.resolve(WAN_T2V_14B)


def test_arrays_that_are_given_are_of_the_models_shape_and_finite():
    size = {"prompt": "x", "height": 32, "width": 48, "num_frames": 5}
    noise, image = np.zeros((1, 16, 2, 4, 6), np.float32), pathlib.Path("a.png")
    of_i2v, of_flf2v = np.zeros((1, 257, 1280), np.float16), np.zeros((1, 514, 1280), np.float32)
    images = {"image": image, "last_image": image}
    no_tower = dataclasses.replace(WAN_I2V_14B, image_encoder=None)
    for config, arguments in (
        (WAN_T2V_14B, {"latents": noise}),
        (WAN_I2V_14B, {"image": image, "image_embeds": of_i2v}),
        (no_tower, {"image": image, "image_embeds": of_i2v}),
        (WAN_FLF2V_14B, {**images, "image_embeds": of_flf2v}),
    ):
        Request(**size, **arguments).resolve(config)
    for config, arguments, message in (
        (WAN_T2V_14B, {"latents": noise[..., :5]}, r"latents has shape \(1, 16, 2, 4, 5\); .* need \(1, 16, 2, 4, 6\)"),
        (WAN_T2V_14B, {"latents": noise.astype(int)}, "latents has dtype int64; pass floating point noise"),
        (WAN_T2V_14B, {"latents": noise + np.inf}, "latents holds NaN or inf; pass finite noise"),
        (WAN_T2V_14B, {"image_embeds": of_i2v}, "image_embeds was given, but this is a t2v model"),
        (
            WAN_I2V_14B,
            {"image": image, "image_embeds": of_flf2v},
            r"image_embeds has shape \(1, 514, 1280\); .* need \(1, 257, 1280\)",
        ),
        (WAN_FLF2V_14B, {**images, "image_embeds": of_i2v}, r"need \(1, 514, 1280\)"),
        (
            WAN_I2V_14B,
            {"image": image, "image_embeds": of_i2v.astype(int)},
            "image_embeds has dtype int64 or NaN or inf",
        ),
        (
            WAN_I2V_14B,
            {"image": image, "image_embeds": of_i2v + np.nan},
            "image_embeds has dtype float16 or NaN or inf",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            Request(**size, **arguments).resolve(config)


def test_the_image_towers_tokens_are_given_where_there_is_no_tower():
    plain, given = (Request(prompt="x", image="a.png", image_embeds=embeds) for embeds in (None, np.zeros(1)))
    for request, config, has_tower in (
        (plain, WAN_I2V_14B, True),
        (given, WAN_I2V_14B, False),
        (plain, WAN_T2V_14B, False),
    ):
        request.check_tower(config, has_tower)
    with pytest.raises(ValueError, match="this checkpoint has no image tower; pass image_embeds="):
        plain.check_tower(WAN_I2V_14B, False)


def test_seeds_are_one_for_each_video_or_count_up():
    assert Request(prompt=["a", "b"], seed=np.array([2**32 - 1, 0])).seed == [2**32 - 1, 0]
    assert Request(prompt=["a", "b"], seed=7)._seeds() == [7, 8]


def test_attention_that_is_left_out_is_what_a_schedule_means():
    """A model that was trained with a schedule is sampled with it; a schedule that is given wins; else dense."""
    config = WAN_T2V_14B
    other = dataclasses.replace(WHOLE, regimes=(dataclasses.replace(WHOLE.regimes[-1], scales_per_tile=1),))
    size = {"prompt": "x", "height": 64, "width": 64, "num_frames": 9}
    plain = Request(**size)
    assert plain.resolve(config).attention == "dense"
    assert plain.resolve(config).segments is None
    trained = plain.resolve(config, WHOLE)
    assert (trained.attention, trained.schedule) == ("fps", WHOLE.resolve(trained.grid))
    assert Request(**size, attention="dense").resolve(config, WHOLE).segments is None
    given = Request(**size, schedule=other).resolve(config, WHOLE)
    assert (given.attention, given.schedule) == ("fps", other.resolve(given.grid))
    assert Request(**size, attention="fp8").resolve(config, WHOLE).schedule == WHOLE.setting("fp8").resolve(given.grid)


def test_a_size_by_area_is_the_images_and_is_recorded_as_what_it_is(tmp_path):
    from PIL import Image

    Image.new("RGB", (480, 832)).save(tmp_path / "portrait.png")
    request = Request(prompt="a", image=tmp_path / "portrait.png", size="area", height=480, width=832)
    resolved = request.resolve(WAN_I2V_14B)
    assert resolved.latent_shape[-2:] == (104, 60)
    assert resolved.flow_shift == 3.0  # of the area that is asked for, as in generate.py
    assert [frame.shape for frame in request.frames(WAN_I2V_14B)] == [(1, 832, 480, 3)]
    filled = request.filled(WAN_I2V_14B)
    assert (filled.height, filled.width, filled.size) == (832, 480, "exact")
    assert filled.resolve(WAN_I2V_14B).latent_shape == resolved.latent_shape


def test_the_noise_of_a_seed_is_the_same_in_every_release_and_under_any_setting():
    """Golden, from NumPy alone: threefry2x32 (Salmon et al. 2011) counted as JAX does where it is partitionable, and JAX's map from
    bits to a normal number."""
    import jax

    want = _normal_by_hand(7, (16, 2, 2, 3))
    request = Request(prompt=["a", "b"], seed=6)
    for impl, partitionable in (("threefry2x32", True), ("threefry2x32", False), ("rbg", False)):
        with jax.default_prng_impl(impl), jax.threefry_partitionable(partitionable):
            # erf's inverse is a polynomial in float32, good to 1e-6 or so (Giles 2010)
            np.testing.assert_allclose(request.noise((2, 16, 2, 2, 3))[1], want, rtol=3e-6, atol=2e-6)


def _normal_by_hand(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    from scipy.special import erfinv

    count = np.arange(np.prod(shape), dtype=np.uint64)
    low, high = _threefry((0, seed), (count >> np.uint64(32)).astype(np.uint32), count.astype(np.uint32))
    bits = low ^ high
    unit = ((bits >> np.uint32(9)) | np.uint32(0x3F800000)).view(np.float32) - np.float32(1)  # [0, 1)
    below = np.nextafter(np.float32(-1), np.float32(0))
    uniform = np.maximum(below, unit * (np.float32(1) - below) + below)
    return (np.sqrt(2) * erfinv(uniform.astype(np.float64))).reshape(shape)


def _threefry(key: tuple[int, int], x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """20 rounds on two words, as in the paper's figure."""
    keys = np.array([*key, key[0] ^ key[1] ^ 0x1BD11BDA], np.uint32)
    rotations = (13, 15, 26, 6), (17, 29, 16, 24)
    x, y = x + keys[0], y + keys[1]
    for group in range(5):
        for turn in rotations[group % 2]:
            x = x + y
            y = ((y << np.uint32(turn)) | (y >> np.uint32(32 - turn))) ^ x
        x, y = x + keys[(group + 1) % 3], y + keys[(group + 2) % 3] + np.uint32(group + 1)
    return x, y


def test_sizes_in_numpys_small_integers_dont_overflow():
    """720 x 1280 pixels are more than an int16 counts."""
    request = Request(prompt="a", height=np.int16(720), width=np.int16(1280), num_frames=np.int8(81))
    resolved = request.resolve(WAN_T2V_14B)
    assert resolved.latent_shape == (1, 16, 21, 90, 160)
    assert resolved.flow_shift == 5.0
    with pytest.raises(ValueError, match=r"height=720\.5 is not a whole number"):
        Request(prompt="a", height=720.5)

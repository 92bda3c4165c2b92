"""The whole pipeline against Wan's and diffusers' own, and what it says about bad requests. Goldens: tests/data/README.md."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fps_convert.synthetic import tiny_config, write_checkpoint
from fps_jax import WanPipeline
from fps_jax.checkpoints import placement
from fps_jax.config import NEGATIVE_PROMPTS, VAEConfig
from fps_jax.models.params import flatten
from fps_jax.sampling import pipeline
from tests.checkpoints import T2V, assemble
from tests.reference import golden, rel_l2

CAT, NEGATIVE = "A cat walks in the snow.", "worst quality, low quality, static"
SIZE = {"height": 32, "width": 48, "num_frames": 9}


@pytest.fixture(scope="module")
def t2v() -> WanPipeline:
    return WanPipeline.from_pretrained(T2V, dtype="float32")


def make(task: str):
    @pytest.fixture(scope="module")
    def pipe(tmp_path_factory) -> WanPipeline:
        return WanPipeline.from_pretrained(assemble(tmp_path_factory.mktemp(task) / "model", task), dtype="float32")

    return pipe


i2v, flf2v = make("i2v"), make("flf2v")

# case, solver, grid, steps, guidance, flow shift, prompt, negative prompt
T2V_CASES = [
    ("unipc6_cfg5", "unipc", "diffusers", 6, 5.0, None, CAT, NEGATIVE),
    ("unipc6_cfg5_legacy_sigmas", "unipc", "wan", 6, 5.0, None, CAT, NEGATIVE),
    ("euler4_cfg5", "euler", "diffusers", 4, 5.0, None, CAT, NEGATIVE),
    ("unipc4_nocfg", "unipc", "diffusers", 4, 1.0, None, CAT, NEGATIVE),
    ("dpmpp6_cfg5", "dpm++", "wan", 6, 5.0, 3.0, CAT, NEGATIVE),
    ("unipc4_default_neg", "unipc", "wan", 4, 6.0, 5.0, CAT, None),
    ("unipc4_batch2", "unipc", "diffusers", 4, 5.0, None, ["A red panda walks slowly", CAT], ["", NEGATIVE]),
]


@pytest.mark.parametrize("case", T2V_CASES, ids=lambda c: c[0])
def test_t2v_latents_match_upstream(t2v, case):
    name, solver, grid, steps, guidance, shift, prompt, negative = case
    g = golden(f"e2e_{name}")
    noise = g["in.latents"] if "in.latents" in g else g["in.noise"][None]
    out = t2v(
        prompt, negative_prompt=negative, num_inference_steps=steps, guidance_scale=guidance, flow_shift=shift, solver=solver,
        sigma_grid=grid, latents=noise, output_type="latent", **SIZE,
    )  # fmt: skip
    want = g["out.latents"]
    assert rel_l2(out, want if want.ndim == 5 else want[None]) <= 1e-4


def test_t2v_frames_match_diffusers(t2v):
    g = golden("e2e_unipc6_cfg5")
    video = t2v(
        CAT, negative_prompt=NEGATIVE, num_inference_steps=6, sigma_grid="diffusers", latents=g["in.latents"], **SIZE
    )
    assert video.dtype == np.float32
    assert rel_l2(video, g["out.video_np"]) <= 1e-4


@pytest.mark.parametrize("task", ["i2v", "flf2v"])
def test_image_to_video_matches_diffusers(task, request):
    pipe, g = request.getfixturevalue(task), golden(f"{task}_pipeline")
    images = {"image": g["in.image"]} | ({"last_image": g["in.last_image"]} if task == "flf2v" else {})
    condition = pipe._condition([image[None] for image in images.values()], g["in.latents"].shape, False)
    assert rel_l2(condition, g["condition"]) <= 1e-5
    out = pipe(
        CAT, negative_prompt=NEGATIVE, num_inference_steps=3, sigma_grid="diffusers", latents=g["in.latents"],
        image_embeds=g["in.image_embeds"].astype(np.float32), output_type="latent", **images, **SIZE,
    )  # fmt: skip
    assert rel_l2(out, g["out.latents"]) <= 1e-4


def test_image_tower_reads_the_frame_where_no_embeds_are_given(tmp_path):
    from fps_convert.synthetic import tiny_config, write_checkpoint

    write_checkpoint(tmp_path / "i2v", tiny_config("i2v"), layout="diffusers", tokenizer_dir=T2V / "tokenizer")
    pipe = WanPipeline.from_pretrained(tmp_path / "i2v", dtype="float32")
    frame = np.random.default_rng(0).random((32, 48, 3), np.float32)
    out = quick(pipe, image=frame)
    given = pipe._encode_images([frame[None]], 1)
    np.testing.assert_array_equal(quick(pipe, image=frame, image_embeds=given), out)
    assert rel_l2(quick(pipe, image=1 - frame, image_embeds=given), out) > 1e-3  # the VAE's condition changes


def test_default_negative_prompts_are_wans_own():
    assert NEGATIVE_PROMPTS["t2v"].startswith("色调艳丽，过曝")
    assert NEGATIVE_PROMPTS["i2v"] == "镜头晃动，" + NEGATIVE_PROMPTS["t2v"]
    assert NEGATIVE_PROMPTS["flf2v"] == "镜头切换，" + NEGATIVE_PROMPTS["i2v"]


def quick(pipe: WanPipeline, prompt=CAT, **changes):
    return pipe(prompt, **{"num_inference_steps": 2, "output_type": "latent", **SIZE, **changes})


def test_a_sample_depends_on_its_own_seed_alone(t2v):
    two = quick(t2v, [CAT, CAT], seed=7)
    np.testing.assert_allclose(quick(t2v, seed=8)[0], two[1], atol=2e-5)
    listed = quick(t2v, [CAT, CAT], seed=[8, 7])
    np.testing.assert_allclose(listed[::-1], two, atol=2e-5)
    assert rel_l2(two[0], two[1]) > 0.1
    np.testing.assert_array_equal(quick(t2v, [CAT, CAT], seed=7), two)


@pytest.mark.parametrize("task", ["t2v", "i2v"])
def test_a_model_with_six_latent_channels_is_written_loaded_and_sampled(tmp_path, task):
    """None of Wan's, whose VAE has 16: small models for few data have 4 to 8."""
    vae = VAEConfig(base_dim=8, z_dim=6, latents_mean=(0.5,) * 6, latents_std=(2.0,) * 6, num_res_blocks=1)
    plain = tiny_config(task, flow_shift_480p=None)  # diffusers' files can't say that
    dit = dataclasses.replace(plain.dit, in_channels=6 if task == "t2v" else 16, out_channels=6)
    config = dataclasses.replace(plain, vae=vae, dit=dit)
    write_checkpoint(tmp_path / "torch", config, layout="diffusers", tokenizer_dir=T2V / "tokenizer")
    pipe = WanPipeline.from_pretrained(tmp_path / "torch", dtype="float32")
    assert pipe.config == config
    if task == "i2v":  # what differs is in the sizes of the parameters, and those are checked as they are read
        return
    video = pipe(CAT, height=16, width=16, num_frames=1, num_inference_steps=1, guidance_scale=1.0)
    assert video.shape == (1, 1, 16, 16, 3)
    assert np.isfinite(video).all()
    pipe.save_pretrained(tmp_path / "ours")
    assert WanPipeline.from_pretrained(tmp_path / "ours", dtype="float32").config == config


def test_output_types(t2v):
    g = golden("e2e_unipc4_nocfg")
    video = quick(t2v, output_type="np", latents=g["in.latents"])
    assert video.shape == (1, 9, 32, 48, 3)
    assert video.min() >= 0
    assert video.max() <= 1
    images = quick(t2v, output_type="pil", latents=g["in.latents"])
    assert (len(images), len(images[0]), images[0][0].size) == (1, 9, (48, 32))
    np.testing.assert_allclose(np.asarray(images[0][3]), video[0, 3] * 255, atol=0.501)


def test_callback_and_callers_latents(t2v):
    seen = []
    noise = jax.random.normal(jax.random.key(0), (1, 16, 3, 4, 6))
    quick(t2v, latents=noise, callback=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 2), (2, 2)]
    assert not noise.is_deleted()


def test_bf16_pipeline_stays_close_to_float32(t2v):
    half = WanPipeline.from_pretrained(T2V, dtype="bfloat16")
    dtypes = {path: leaf.dtype for path, leaf in flatten(half.params["dit"])}
    assert dtypes["blocks/mlp/up/kernel"] == jnp.bfloat16
    assert all(leaf.dtype == jnp.bfloat16 for _, leaf in flatten(half.params["text_encoder"]))
    assert all(leaf.dtype == jnp.float32 for _, leaf in flatten(half.params["vae"]))
    # one T5 and three DiT evaluations, at upstream's own bf16 errors of 1.9e-2 and 3.4e-3 (tests/data/README.md)
    arguments = {"num_inference_steps": 1, "guidance_scale": 1.0}
    assert 0 < rel_l2(quick(half, **arguments), quick(t2v, **arguments)) <= 2 * (1.9e-2 + 3.4e-3)


def test_save_and_load_again_is_the_same_pipeline(t2v, tmp_path):
    t2v.save_pretrained(tmp_path / "saved")
    again = WanPipeline.from_pretrained(tmp_path / "saved", dtype="float32")
    assert again.config == t2v.config
    np.testing.assert_array_equal(quick(again), quick(t2v))
    with pytest.raises(FileExistsError, match="saved"):
        t2v.save_pretrained(tmp_path / "saved")


@pytest.mark.parametrize("layout", ["diffusers", "ours"])
def test_the_text_encoder_is_on_the_device_for_its_own_call_only(t2v, tmp_path, monkeypatch, layout):
    source, want = T2V, quick(t2v)
    if layout == "ours":
        t2v.save_pretrained(source := tmp_path / "saved")
    monkeypatch.setattr(placement, "_shares_host_memory", lambda device: False)  # as on a GPU
    pipe = WanPipeline.from_pretrained(source, dtype="float32")
    assert all(isinstance(leaf, np.ndarray) for _, leaf in flatten(pipe.params["text_encoder"]))
    assert all(isinstance(leaf, jax.Array) for _, leaf in flatten(pipe.params["dit"]))
    visits, alive_in_denoise = [], []
    text_states, denoise = pipeline.text_states, pipeline.denoise

    def watch_encode(config, params, *args, **kwargs):
        visits.extend(leaf for _, leaf in flatten(params))
        return text_states(config, params, *args, **kwargs)

    def watch_denoise(*args, **kwargs):
        alive_in_denoise.extend(leaf for leaf in visits if not leaf.is_deleted())
        return denoise(*args, **kwargs)

    monkeypatch.setattr(pipeline, "text_states", watch_encode)
    monkeypatch.setattr(pipeline, "denoise", watch_denoise)
    np.testing.assert_array_equal(quick(pipe), want)
    assert visits
    assert not alive_in_denoise


BAD = [
    ({"num_frames": 10}, r"num_frames=10 is not 4k\+1 .*; use 9"),
    (
        {"latents": np.zeros((1, 16, 3, 4, 7), np.float32)},
        r"latents has shape \(1, 16, 3, 4, 7\); .* need \(1, 16, 3, 4, 6\)",
    ),
    ({"latents": np.zeros((1, 16, 3, 4, 6), np.int32)}, "latents has dtype int32"),
    ({"image": np.zeros((32, 48, 3), np.uint8)}, "image was given, but this is a t2v model"),
    ({"image_embeds": np.zeros((1, 257, 80), np.float32)}, "image_embeds was given, but this is a t2v model"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=lambda p: next(iter(p)) if isinstance(p, dict) else "")
def test_bad_requests_are_named_with_rule_and_fix(t2v, changes, message):
    with pytest.raises(ValueError, match=message):
        quick(t2v, **changes)


def test_i2v_requests_need_their_image(i2v):
    frame, embeds = np.zeros((32, 48, 3), np.uint8), np.zeros((1, 257, 80), np.float32)
    with pytest.raises(ValueError, match="image is missing, and a i2v model needs it"):
        quick(i2v, image_embeds=embeds)
    with pytest.raises(ValueError, match=r"this checkpoint has no image tower; pass image_embeds"):
        quick(i2v, image=frame)


def test_a_damaged_checkpoint_of_ours_is_named(t2v, tmp_path):
    saved = tmp_path / "saved"
    t2v.save_pretrained(saved)
    config = (saved / "config.json").read_text()
    for damaged, message in (
        ("{", r"config.json is not valid JSON .*; convert the checkpoint again"),
        (
            config.replace('"mlp_dim": 128', '"mlp_dim": 120'),
            r"has shape .* its config says .*; convert the checkpoint again",
        ),
    ):
        assert damaged != config
        (saved / "config.json").write_text(damaged)
        with pytest.raises(ValueError, match=message):
            WanPipeline.from_pretrained(saved)
    (saved / "config.json").write_text(config)
    (saved / "dit" / "_METADATA").write_text("")
    with pytest.raises(ValueError, match=r"dit is not a whole orbax directory .*; convert the checkpoint again"):
        WanPipeline.from_pretrained(saved)
    shutil.rmtree(saved / "dit")
    with pytest.raises(FileNotFoundError, match="the checkpoint lacks its dit; convert it again"):
        WanPipeline.from_pretrained(saved)


def test_loading_errors_name_the_path_and_the_fix(tmp_path):
    with pytest.raises(FileNotFoundError, match="doesn't exist; pass a directory, or 'owner/name'"):
        WanPipeline.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="dtype='float16' is not one of 'bfloat16', 'float32'"):
        WanPipeline.from_pretrained(T2V, dtype="float16")
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    with pytest.raises(NotADirectoryError, match="is a file; pass the directory that holds it"):
        WanPipeline.from_pretrained(file)


def test_a_saved_pipeline_goes_back_to_torch_bit_for_bit(t2v, tmp_path):
    from safetensors.numpy import load_file

    from fps_convert import to_torch

    t2v.save_pretrained(tmp_path / "saved")
    to_torch(tmp_path / "saved", tmp_path / "back", layout="diffusers")
    for part in ("transformer", "vae"):
        file = f"{part}/diffusion_pytorch_model.safetensors"
        want, got = load_file(T2V / file), load_file(tmp_path / "back" / file)
        assert want.keys() == got.keys()
        for key, tensor in want.items():
            np.testing.assert_array_equal(got[key], tensor, err_msg=key)

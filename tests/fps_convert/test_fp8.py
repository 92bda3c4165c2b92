"""FP8 files in every spelling of their scales: weight = fp8 x scale, rounded once to bf16; and written as ComfyUI reads them."""

import json
import re

import ml_dtypes
import numpy as np
import pytest

from fps_convert import open_checkpoint, to_flax, to_torch
from fps_convert.formats.arrays import overflow
from fps_convert.fp8 import codes, scale_of
from tests.fps_convert.failing import fails
from tests.fps_convert.tensors import load, read_all, rewrite

DIT = "diffusion_pytorch_model.safetensors"
KEY = "blocks.1.self_attn.q.weight"
E4M3, E5M2, BF16 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.bfloat16


def matrices(tensors):
    return [key for key, value in tensors.items() if value.ndim == 2 and re.match(r"blocks\..*\.weight$", key)]


def loaded(path):
    """KEY's weight as the converter reads it."""
    return open_checkpoint(path).load("dit")["blocks"]["self_attn"]["q"]["kernel"][1].T


def scaled(spelling="scale_weight", per_channel=False, mark=True, kind=E4M3, dtype=np.float32):
    def change(tensors):
        for key in matrices(tensors):
            value = tensors[key]
            amax = np.abs(value).max(1, keepdims=True) if per_channel else np.abs(value).max()
            largest = float(ml_dtypes.finfo(kind).max)
            scale = np.asarray(amax / largest, dtype)
            tensors[key] = np.clip(value / scale.astype(np.float32), -largest, largest).astype(kind)
            tensors[key.replace("weight", spelling)] = scale
        if mark:
            tensors["scaled_fp8"] = np.zeros(2, kind)

    return change


@pytest.mark.parametrize("kind", [E4M3, E5M2])
def test_plain_fp8_is_its_own_values(source, kind):
    path = source("official")
    want = load(path / DIT)[KEY].astype(kind)
    rewrite(path / DIT, lambda t: t.update({key: t[key].astype(kind) for key in [*matrices(t), "head.head.bias"]}))
    got = loaded(path)
    assert got.dtype == BF16
    np.testing.assert_array_equal(got.astype(np.float32), want.astype(np.float32))
    notes = open_checkpoint(path).audit["components"]["dit"]["notes"]
    assert len(notes) == 1
    assert "tensors of F8_" in notes[0]
    assert "bf16" in notes[0]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"spelling": "weight_scale", "mark": False},
        {"per_channel": True, "mark": False, "spelling": "weight_scale"},
        {"kind": E5M2, "dtype": BF16},
    ],
)
def test_scaled_fp8_is_fp8_times_scale_rounded_once(source, options):
    path = source("official")
    original = load(path / DIT)[KEY]
    rewrite(path / DIT, scaled(**options))
    stored = load(path / DIT)
    scale = stored[KEY.replace("weight", options.get("spelling", "scale_weight"))].astype(np.float32)
    want = (stored[KEY].astype(np.float32) * scale).astype(BF16)
    np.testing.assert_array_equal(loaded(path), want)
    # Half a step of the format, of its largest number at most: an eighth of a binade in e4m3, a quarter in e5m2.
    step = 1 / 8 if stored[KEY].dtype == E5M2 else 1 / 16
    assert np.abs(want.astype(np.float32) - original).max() <= (step + 2**-7) * np.abs(original).max()
    assert f"times {len(matrices(stored))} scales" in open_checkpoint(path).audit["components"]["dit"]["notes"][0]


def test_scaled_fp8_is_stored_as_bf16(source, tmp_path):
    path = source("official")
    rewrite(path / DIT, scaled())
    want = np.array(loaded(path))
    to_flax(path, tmp_path / "ours")
    to_torch(tmp_path / "ours", tmp_path / "back", "official")
    assert read_all(tmp_path / "back")["."][KEY] == ("BF16", want.shape, want.tobytes())


def test_activation_scales_and_comfyuis_notes_are_left_aside(source):
    path = source("official")
    rewrite(path / DIT, scaled("weight_scale", mark=False))
    want = loaded(path)
    note = np.frombuffer(json.dumps({"format": "float8_e4m3fn"}).encode(), np.uint8)
    layer = KEY.removesuffix(".weight")
    extra = {f"{layer}.comfy_quant": note, f"{layer}.input_scale": np.ones((), np.float32)}
    rewrite(path / DIT, lambda t: t.update(extra))
    np.testing.assert_array_equal(loaded(path), want)
    other = np.frombuffer(json.dumps({"format": "nvfp4"}).encode(), np.uint8)
    rewrite(path / DIT, lambda t: t.update({f"{layer}.comfy_quant": other}))
    with pytest.raises(NotImplementedError, match="says 'nvfp4', which isn't supported"):
        open_checkpoint(path)


def test_a_scale_on_weights_that_are_not_fp8_counts_too(source):
    """A file cast to bf16 with its scales kept: dropping them would give weights hundreds of times too large."""
    path = source("official")
    rewrite(path / DIT, scaled())
    want = loaded(path)
    rewrite(path / DIT, lambda t: t.update({key: t[key].astype(BF16) for key in matrices(t)}))
    np.testing.assert_array_equal(loaded(path), want)


SCALE = KEY.replace("weight", "scale_weight")


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda t: t.pop(SCALE), f"FP8 tensor {KEY!r} lacks its scale, which others of this file have"),
        (
            lambda t: t.update({"ghost.scale_weight": np.ones((), np.float32)}),
            "'ghost.scale_weight' is the scale of no tensor",
        ),
        (lambda t: t.update({SCALE: np.zeros((), np.float32)}), f"scale {SCALE!r} has zero, NaN or inf"),
        (lambda t: t.update({SCALE: np.full((), np.nan, np.float32)}), f"scale {SCALE!r} has zero, NaN or inf"),
        (
            lambda t: t.update({SCALE: np.full((), 1e38, np.float32)}),
            f"tensor {KEY!r} times its scale 1e+38 overflows bfloat16",
        ),
        (lambda t: t.update({SCALE: np.ones((2, 2), np.float32)}), f"scale {SCALE!r} has shape [2, 2] for [48, 48]"),
        (lambda t: t.update({SCALE: np.ones((), np.int64)}), f"scale {SCALE!r} has dtype I64"),
        (lambda t: t.update({KEY: t[KEY].view(np.int8)}), f"tensor {KEY!r} has dtype I8 and a scale"),
        (lambda t: t.update({KEY.replace("weight", "weight_scale"): t[SCALE]}), "has two scales"),
        (lambda t: t.update({KEY.replace("weight", "weight_scale_inv"): t[SCALE]}), "holds scales of blocks"),
    ],
)
def test_scales_that_cannot_be_right(source, tmp_path, capsys, change, part):
    path = source("official")
    rewrite(path / DIT, scaled())
    rewrite(path / DIT, change)
    message = fails(capsys, "to-flax", path, tmp_path / "out")
    assert DIT in message
    assert part in message
    assert not (tmp_path / "out").exists()


def test_codes_times_scale_are_within_half_a_step():
    weights = np.random.default_rng(0).standard_normal((300, 200)).astype(np.float32)
    scale = scale_of(weights)
    assert scale.shape == ()
    assert np.abs(weights).max() / scale == pytest.approx(448, rel=1e-6)
    error = np.abs(codes(weights, scale).astype(np.float32) * scale - weights)
    # Half a step of e4m3: 2^-4 of a normal number, 2^-10 of the scale of a subnormal one.
    assert (error <= np.maximum(np.abs(weights) * 2**-4, scale * 2**-10) * (1 + 1e-5)).all()
    assert scale_of(np.zeros((2, 2), BF16)) == 1
    tiny = np.full((2, 2), 1e-38, np.float32)
    assert np.isfinite(codes(tiny, scale_of(tiny)).astype(np.float32)).all()


def test_fp8_scaled_is_written_as_comfyui_reads_it(pristine, tmp_path, capsys):
    source = pristine("official")
    original = load(source / DIT)
    to_flax(source, tmp_path / "ours")
    to_torch(tmp_path / "ours", tmp_path / "comfy", "comfyui", dtype="fp8_scaled")
    written = load(tmp_path / "comfy" / "diffusion_models" / "wan2.1_dit.safetensors")
    assert (written["scaled_fp8"].dtype, written["scaled_fp8"].shape) == (E4M3, (2,))
    names = matrices(original)
    assert {key for key, value in written.items() if value.dtype == E4M3} == {*names, "scaled_fp8"}
    scales = {key for key in written if key.endswith("scale_weight")}
    assert scales == {key.replace("weight", "scale_weight") for key in names}
    assert all(written[key].dtype == np.float32 and written[key].shape == () for key in scales)
    rest = written.keys() - scales - {*names, "scaled_fp8"}
    assert rest == original.keys() - {*names}
    for key in rest:
        np.testing.assert_array_equal(written[key], original[key].astype(BF16))
    back = open_checkpoint(tmp_path / "comfy")
    want = (written[KEY].astype(np.float32) * written[SCALE]).astype(BF16)
    np.testing.assert_array_equal(back.load("dit")["blocks"]["self_attn"]["q"]["kernel"][1].T, want)
    assert np.abs(want.astype(np.float32) - original[KEY]).max() < 0.07 * np.abs(original[KEY]).max()
    vae = load(tmp_path / "comfy" / "vae" / "wan_2.1_vae.safetensors")
    assert {value.dtype for value in vae.values()} == {np.dtype(np.float32)}
    message = fails(
        capsys, "to-torch", tmp_path / "ours", tmp_path / "out", "--layout", "official", "--dtype", "bfloat16"
    )
    assert "dtype='bfloat16' with layout='official': give bfloat16 or fp8_scaled with comfyui" in message


def test_bf16_comfyui_files(pristine, tmp_path):
    to_flax(pristine("official"), tmp_path / "ours")
    to_torch(tmp_path / "ours", tmp_path / "comfy", "comfyui", dtype="bfloat16")
    original = load(pristine("official") / DIT)
    written = load(tmp_path / "comfy" / "diffusion_models" / "wan2.1_dit.safetensors")
    assert written.keys() == original.keys()
    for key, value in written.items():
        np.testing.assert_array_equal(value, original[key].astype(BF16))


def test_a_cast_that_overflows_names_the_tensor(source, tmp_path, capsys):
    path = source("official")
    rewrite(path / DIT, lambda t: t[KEY].__setitem__((3, 4), -70000.0))
    message = fails(capsys, "to-flax", path, tmp_path / "out", "--dtype", "float16")
    for part in (DIT, repr(KEY), "holds 70000", "float16 can't", "bfloat16 or float32"):
        assert part in message
    to_flax(path, tmp_path / "out", dtype="bfloat16")  # holds it


@pytest.mark.parametrize(
    ("source", "dtype", "value", "lost"),
    [
        (np.float32, np.float16, 65519.0, False),  # rounds down to 65504, the largest
        (np.float32, np.float16, 65520.0, True),
        (np.float32, np.float16, np.inf, False),  # is inf before, too
        (BF16, np.float16, -70000.0, True),
        (np.float32, BF16, 3.3965e38, True),
        (np.float32, BF16, 3.38e38, False),
        (np.float16, BF16, 65504.0, False),
        (np.float16, np.float32, 65504.0, False),
    ],
)
def test_overflow_is_what_the_cast_makes_inf(source, dtype, value, lost):
    values = np.zeros((3, 5), source)
    values[2, 1], values[0, 0] = value, np.nan
    with np.errstate(over="ignore"):
        assert (np.isinf(values.astype(dtype)) & np.isfinite(values)).any() == lost
    assert (overflow(values, dtype) is not None) == lost
    assert (overflow(values[2, 1], dtype) is not None) == lost

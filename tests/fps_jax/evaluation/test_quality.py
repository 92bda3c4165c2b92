"""PSNR and SSIM against scikit-image and against their definitions."""

import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from fps_jax.evaluation.quality import mean_squared_error, psnr, relative_l2, ssim


@pytest.fixture(params=[0.003, 0.05, 0.4], ids="noise {}".format)
def pair(request):
    """A smooth video of odd sizes, and the same with noise; frame 2 with none."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:45, 0:37].astype(np.float32)
    frames = [np.stack([x / 36, y / 44, 0.5 + 0.5 * np.sin(x / 3 + f)], axis=-1) for f in range(4)]
    reference = np.stack(frames).astype(np.float32)
    video = np.clip(reference + request.param * rng.normal(size=reference.shape), 0, 1).astype(np.float32)
    video[2] = reference[2]
    return video, reference


def test_psnr_is_scikit_images(pair):
    video, reference = pair
    got = psnr(video, reference)
    for i in (0, 1, 3):
        want = peak_signal_noise_ratio(reference[i].astype(np.float64), video[i].astype(np.float64), data_range=1)
        assert got[i] == pytest.approx(want, rel=1e-12)  # float64 sums in another order
    assert got[2] == np.inf


def test_ssim_is_scikit_images_with_wangs_settings(pair):
    video, reference = pair
    got = ssim(video, reference)
    for i in range(4):
        want = structural_similarity(
            reference[i].astype(np.float64),
            video[i].astype(np.float64),
            data_range=1,
            channel_axis=-1,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        assert got[i] == pytest.approx(want, abs=1e-10)  # float64 sums in another order, over variances down to 1e-6
    assert got[2] == 1


def test_ssim_of_constant_frames_is_the_luminance_term():
    """Without variance what remains is (2ab + C1) / (a^2 + b^2 + C1), C1 = 0.01^2."""
    a, b = np.full((1, 12, 12, 3), 0.25), np.full((1, 12, 12, 3), 0.5)
    assert ssim(a, b)[0] == pytest.approx((2 * 0.25 * 0.5 + 1e-4) / (0.25**2 + 0.5**2 + 1e-4), rel=1e-9)


def test_ssim_sees_structure_where_psnr_sees_size():
    """Of two errors of equal energy, a shift of brightness and noise, only noise breaks the structure."""
    rng = np.random.default_rng(1)
    reference = np.full((1, 64, 64, 3), 0.5)
    reference[:, ::4] = 0.6
    noise = rng.normal(size=reference.shape)
    noise *= 0.05 / np.sqrt(np.mean(noise**2))
    assert psnr(reference + 0.05, reference)[0] == pytest.approx(psnr(reference + noise, reference)[0], rel=1e-9)
    assert ssim(reference + 0.05, reference)[0] > ssim(reference + noise, reference)[0] + 0.1


def test_bytes_are_the_same_as_floats_of_255ths():
    rng = np.random.default_rng(2)
    a, b = rng.integers(0, 256, (2, 2, 16, 16, 3), np.uint8)
    np.testing.assert_allclose(psnr(a, b), psnr(a / 255, b / 255), rtol=1e-12)
    np.testing.assert_allclose(ssim(a, b / 255), ssim(a / 255, b / 255), rtol=1e-12)


def test_known_errors():
    reference = np.zeros((2, 16, 16, 3), np.float32)
    video = reference.copy()
    video[1] = 0.1
    np.testing.assert_allclose(mean_squared_error(video, reference), [0, 0.01], rtol=1e-6)  # float32's 0.1
    np.testing.assert_allclose(psnr(video, reference), [np.inf, 20], rtol=1e-6)
    assert relative_l2([3.0, 4.0], [3.0, 0.0]) == pytest.approx(4 / 3)
    assert relative_l2([1.0], [0.0]) == np.inf


@pytest.mark.parametrize(
    ("video", "message"),
    [
        (np.zeros((2, 16, 16, 3)), r"video has shape \(2, 16, 16, 3\) and reference \(1, 16, 16, 3\)"),
        (np.zeros((1, 1, 16, 16, 3)), r"must be \[F, H, W, 3\]"),
        (np.zeros((1, 16, 16, 3), np.int64), "dtype int64; pass uint8 or floats"),
        (np.full((1, 16, 16, 3), 1.5), r"values in \[1.5, 1.5\]; floats must be in \[0, 1\] and finite"),
        (np.full((1, 16, 16, 3), np.nan), r"values in \[nan, nan\]"),
    ],
)
@pytest.mark.parametrize("measure", [psnr, ssim])
def test_wrong_arguments(measure, video, message):
    with pytest.raises(ValueError, match=message):
        measure(video, np.zeros((1, 16, 16, 3)))


def test_frames_smaller_than_the_window():
    with pytest.raises(ValueError, match="10x16 pixels; SSIM's window needs 11x11"):
        ssim(np.zeros((1, 10, 16, 3)), np.zeros((1, 10, 16, 3)))
    with pytest.raises(ValueError, match=r"x has shape \(2,\) and reference \(3,\)"):
        relative_l2(np.zeros(2), np.zeros(3))

"""How far one video is from another: PSNR and SSIM of each frame."""

from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.ndimage import correlate1d

_SIGMA, _RADIUS = 1.5, 5  # pixels; an 11 x 11 window
_C1, _C2 = 0.01**2, 0.03**2


def psnr(video: Any, reference: Any) -> Float[np.ndarray, "F"]:
    """Peak signal-to-noise ratio of each frame in dB: -10 log10 of the mean squared error, peak 1; inf where frames are equal.

    Args:
      video, reference: `[F, H, W, 3]`, floats in [0, 1] or uint8.
    Raises: ValueError for another shape or dtype, shapes that differ, or values that are NaN, inf or outside [0, 1].
    """
    errors = mean_squared_error(video, reference)
    with np.errstate(divide="ignore"):
        return -10 * np.log10(errors)


def mean_squared_error(video: Any, reference: Any) -> Float[np.ndarray, "F"]:
    """Mean over pixels and channels of the squared difference, for each frame. Arguments and errors as for `psnr`."""
    video, reference = _checked(video, reference)
    pairs = zip(video, reference, strict=True)
    return np.array([np.mean((_unit(a) - _unit(b)) ** 2) for a, b in pairs])


def ssim(video: Any, reference: Any) -> Float[np.ndarray, "F"]:
    """Structural similarity of each frame, averaged over the three channels: 1 where frames are equal.

    Gaussian window of 11 x 11 pixels with a deviation of 1.5, K1 0.01, K2 0.03, data range 1; averaged over the places where the
    window lies within the frame.

    Args:
      video, reference: `[F, H, W, 3]` as for `psnr`, 11 x 11 pixels or more.
    Raises: as `psnr`.
    Source: Wang, Bovik, Sheikh and Simoncelli 2004, "Image quality assessment: from error visibility to structural similarity".
    """
    video, reference = _checked(video, reference)
    if min(video.shape[1:3]) <= 2 * _RADIUS:
        raise ValueError(f"video has {video.shape[1]}x{video.shape[2]} pixels; SSIM's window needs 11x11 or more")
    return np.array([_ssim(_unit(a), _unit(b)) for a, b in zip(video, reference, strict=True)])


def relative_l2(x: Any, reference: Any) -> float:
    """|x - reference| / |reference| in float64, over all elements; inf or nan for a reference of zeros."""
    x, reference = np.asarray(x, np.float64), np.asarray(reference, np.float64)
    if x.shape != reference.shape:
        raise ValueError(f"x has shape {x.shape} and reference {reference.shape}; they must be equal")
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.linalg.norm(x - reference) / np.linalg.norm(reference))


def _ssim(a: Float[np.ndarray, "H W 3"], b: Float[np.ndarray, "H W 3"]) -> float:
    mean_a, mean_b = _local_mean(a), _local_mean(b)
    var_a = _local_mean(a * a) - mean_a * mean_a
    var_b = _local_mean(b * b) - mean_b * mean_b
    covariance = _local_mean(a * b) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + _C1) / (mean_a * mean_a + mean_b * mean_b + _C1)
    structure = (2 * covariance + _C2) / (var_a + var_b + _C2)
    return float(np.mean(luminance * structure))


def _local_mean(x: Float[np.ndarray, "H W 3"]) -> Float[np.ndarray, "h w 3"]:
    offsets = np.arange(-_RADIUS, _RADIUS + 1)
    weights = np.exp(-(offsets**2) / (2 * _SIGMA**2))
    weights /= weights.sum()
    inside = slice(_RADIUS, -_RADIUS)
    rows = correlate1d(x, weights, axis=0)[inside]
    return correlate1d(rows, weights, axis=1)[:, inside]


def _checked(video: Any, reference: Any) -> tuple[np.ndarray, np.ndarray]:
    video, reference = (_frames(name, x) for name, x in (("video", video), ("reference", reference)))
    if video.shape != reference.shape:
        raise ValueError(f"video has shape {video.shape} and reference {reference.shape}; they must be equal")
    return video, reference


def _frames(name: str, x: Any) -> np.ndarray:
    frames = np.asarray(x)
    if frames.ndim != 4 or frames.shape[-1] != 3 or not frames.size:
        raise ValueError(f"{name} has shape {frames.shape}; it must be [F, H, W, 3] (one sample of a batch: {name}[0])")
    if frames.dtype == np.uint8:
        return frames
    if not np.issubdtype(frames.dtype, np.floating):
        raise ValueError(f"{name} has dtype {frames.dtype}; pass uint8 or floats in [0, 1]")
    low, high = frames.min(), frames.max()
    if not (low >= 0 and high <= 1):  # written so that NaN is refused, too
        raise ValueError(f"{name} has values in [{low:.4g}, {high:.4g}]; floats must be in [0, 1] and finite")
    return frames


def _unit(frame: np.ndarray) -> Float[np.ndarray, "H W 3"]:
    """float64 in [0, 1]; a frame at a time, so that no second copy of a video is held."""
    return frame.astype(np.float64) / 255 if frame.dtype == np.uint8 else frame.astype(np.float64)

"""Layers of the causal 3D VAE, channel-last: convolutions that see the frames before a chunk, norms, resampling.

Everything is float32 with full-precision products (`_PRECISION`): in bf16 or TF32 the error of some thirty layers is
visible. Source: Wan-Video/Wan2.1 wan/modules/vae.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

Cache = tuple[Array, ...]  # what each convolution keeps of one chunk for the next, in the order of the calls

_PRECISION = lax.Precision.HIGHEST  # a GPU's default for float32 is TF32, 10 bits
_kernel_init = nnx.initializers.lecun_normal()


class History:
    """The frames before a chunk, place by place, while a model runs; `cache` is what the next chunk needs.

    A place that has seen no frame yet has zeros for them: upstream pads with zeros there, and so starts its temporal
    upsampling too (in chunk 1, which doesn't see chunk 0).
    """

    def __init__(self, previous: Cache | None):
        self.first = previous is None
        self._previous = iter(previous or ())
        self._next: list[Array] = []

    @property
    def cache(self) -> Cache:
        return tuple(self._next)

    def take(self, x: Float[Array, "B F H W C"], frames: int) -> Float[Array, "B frames H W C"] | None:
        """The frames before x here, None in the first chunk. x's last ones are kept for the next chunk."""
        past = None if self.first else next(self._previous)
        missing = frames - x.shape[1]
        if missing > 0:
            before = (
                jnp.zeros_like(x, shape=(x.shape[0], missing, *x.shape[2:])) if past is None else past[:, -missing:]
            )
            self._next.append(jnp.concatenate([before, x], axis=1))
        else:
            self._next.append(x[:, -frames:])
        return past

    def skip(self, x: Float[Array, "B F H W C"], frames: int) -> None:
        """Nothing of the first chunk is kept here."""
        self._next.append(jnp.zeros_like(x, shape=(x.shape[0], frames, *x.shape[2:])))


class WholeClip(History):
    """A clip as one chunk: no frames are before it, none are kept. What the chunks give one after the other, from one program.

    For training, which holds every frame's activations anyway: chunk by chunk, 9 frames compile in minutes.
    """

    def __init__(self):
        super().__init__(None)

    def take(self, x: Float[Array, "B F H W C"], frames: int) -> None:
        return None

    def skip(self, x: Float[Array, "B F H W C"], frames: int) -> None:
        return None


def conv2d(x: Float[Array, "N H W C"], kernel: Float[Array, "h w C O"], *, stride=1, padding=None) -> Array:
    """2D convolution without bias. padding: ((top, bottom), (left, right)), by default what keeps H and W."""
    if padding is None:
        padding = [(k // 2, k // 2) for k in kernel.shape[:2]]
    dimensions = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, kernel, (stride,) * 2, padding, dimension_numbers=dimensions, precision=_PRECISION
    )


def matmul(x: Float[Array, "... C"], kernel: Float[Array, "C O"]) -> Float[Array, "... O"]:
    return jnp.einsum("...c,co->...o", x, kernel, precision=_PRECISION)


@functools.cache
def toom_cook(outputs: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Matrices (A, G, B) of F(outputs, 3): a 3-tap correlation d -> y is y = A @ ((G @ taps) * (B @ d)).

    outputs + 2 products instead of 3 * outputs. The transpose of polynomial multiplication by evaluation at small points
    (Winograd 1980; Lavin and Gray, arXiv 1509.09308).
    """
    points = np.array([0, 1, -1, 0.5, -2][: outputs + 1])  # and infinity

    def evaluate(degree: int) -> np.ndarray:
        return np.vstack([points[:, None] ** np.arange(degree), np.eye(degree)[-1]])

    return evaluate(outputs).T, evaluate(3), np.linalg.inv(evaluate(outputs + 2)).T


def _combine(coefficients: np.ndarray, arrays: list[Array]) -> Array:
    # strong float32 scalars, and no products with 0 and 1
    terms = [a if c == 1 else a * np.float32(c) for c, a in zip(coefficients, arrays, strict=True) if abs(c) > 1e-12]
    return functools.reduce(jnp.add, terms)


def _causal_conv_cpu(x: Array, past: Array, kernel: Array) -> Array:
    """Few 2D convolutions instead of a 3D one, which XLA runs on CPUs at less than half the speed.

    Two and four frames go through Toom-Cook in time: 4 and 6 convolutions of one frame instead of 6 and 12. Rounding error
    is 2 to 3 times that of the plain sum (7e-7 relative).
    """
    frames = [*jnp.unstack(past, axis=1), *jnp.unstack(x, axis=1)]
    taps = list(kernel)
    outputs = x.shape[1]
    if outputs not in (2, 4):
        images = [
            sum((conv2d(frames[f + t], taps[t]) for t in range(1, 3)), conv2d(frames[f], taps[0]))
            for f in range(outputs)
        ]
        return jnp.stack(images, axis=1)
    to_output, to_taps, to_input = toom_cook(outputs)
    products = [
        conv2d(_combine(of_input, frames), _combine(of_taps, taps))
        for of_input, of_taps in zip(to_input, to_taps, strict=True)
    ]
    return jnp.stack([_combine(row, products) for row in to_output], axis=1)


def _causal_conv_clip(x: Array, kernel: Array) -> Array:
    """A whole clip's, zeros before it: one 2D convolution over three frames' channels side by side.

    The form whose gradient is small to compile and fast on a CPU: for 9 frames of 32 x 32 with 8 channels 34 ms, where that of a
    3D convolution takes 186 ms.
    """
    batch, frames, height, width, channels = x.shape
    x = jnp.pad(x, ((0, 0), (2, 0), (0, 0), (0, 0), (0, 0)))
    wide = jnp.concatenate([x[:, t : t + frames] for t in range(3)], axis=-1)
    taps = jnp.moveaxis(kernel, 0, 2).reshape(*kernel.shape[1:3], 3 * channels, -1)
    return conv2d(wide.reshape(-1, height, width, 3 * channels), taps).reshape(batch, frames, height, width, -1)


def _causal_conv_default(x: Array, past: Array, kernel: Array) -> Array:
    padding = [(0, 0), *((k // 2, k // 2) for k in kernel.shape[1:3])]
    x = jnp.concatenate([past, x], axis=1)
    dimensions = ("NDHWC", "DHWIO", "NDHWC")
    return lax.conv_general_dilated(x, kernel, (1, 1, 1), padding, dimension_numbers=dimensions, precision=_PRECISION)


def causal_conv(
    x: Float[Array, "B F H W C"], past: Float[Array, "B 2 H W C"] | None, kernel: Float[Array, "3 h w C O"]
) -> Float[Array, "B F H W O"]:
    """Convolution over two past frames and x, without bias. past=None: zeros, for a chunk of one frame or a whole clip."""
    if past is None and x.shape[1] == 1:
        return conv2d(x[:, 0], kernel[2])[:, None]  # the other taps see zeros
    if past is None:
        return _causal_conv_clip(x, kernel)
    # The one place where the platform matters: a GPU's library has a fast conv3d, XLA's CPU backend doesn't.
    # By lowering platform, not by default backend: a program compiled for a GPU on another machine gets the GPU's form.
    return lax.platform_dependent(x, past, kernel, cpu=_causal_conv_cpu, default=_causal_conv_default)


class Conv(nnx.Module):
    """Kernel [taps..., in, out] and bias [out] of a convolution or, with no taps, a linear map."""

    def __init__(self, taps: tuple[int, ...], d_in: int, d_out: int, rngs: nnx.Rngs):
        self.kernel = nnx.Param(_kernel_init(rngs.params(), (*taps, d_in, d_out), jnp.float32))
        self.bias = nnx.Param(jnp.zeros(d_out))

    def pointwise(self, x: Float[Array, "B F H W C"]) -> Float[Array, "B F H W O"]:
        """The convolution where all taps are 1."""
        return matmul(x, self.kernel[...].reshape(self.kernel.shape[-2:])) + self.offset

    def causal(self, x: Float[Array, "B F H W C"], history: History) -> Float[Array, "B F H W O"]:
        return causal_conv(x, history.take(x, 2), self.kernel[...]) + self.offset

    @property
    def offset(self) -> Float[Array, "1 1 1 1 O"]:
        return self.bias[...].reshape(1, 1, 1, 1, -1)


class RMSNorm(nnx.Module):
    """x / |x| * sqrt(C) * scale over channels. Not rsqrt(mean + eps): that would differ where x is small."""

    def __init__(self, dim: int):
        self.scale = nnx.Param(jnp.ones(dim))

    def __call__(self, x: Float[Array, "B F H W C"]) -> Float[Array, "B F H W C"]:
        dim = self.scale.shape[0]
        square = jnp.square(x).sum(-1, keepdims=True)
        length = jnp.sqrt(jnp.maximum(square, 1e-24))  # the bound inside: sqrt's derivative at 0 would make NaN of it
        return x * (np.float32(dim**0.5) / length) * self.scale[...].reshape(1, 1, 1, 1, dim)


class ResidualBlock(nnx.Module):
    """Norm, SiLU, convolution, twice, plus the input."""

    def __init__(self, d_in: int, d_out: int, rngs: nnx.Rngs):
        self.norm1, self.norm2 = RMSNorm(d_in), RMSNorm(d_out)
        self.conv1 = Conv((3, 3, 3), d_in, d_out, rngs)
        self.conv2 = Conv((3, 3, 3), d_out, d_out, rngs)
        self.shortcut = Conv((1, 1, 1), d_in, d_out, rngs) if d_in != d_out else None

    def __call__(self, x: Float[Array, "B F H W C"], history: History) -> Float[Array, "B F H W O"]:
        residual = x if self.shortcut is None else self.shortcut.pointwise(x)
        x = self.conv1.causal(jax.nn.silu(self.norm1(x)), history)
        return residual + self.conv2.causal(jax.nn.silu(self.norm2(x)), history)


class AttentionBlock(nnx.Module):
    """Single-head attention over the positions of each frame."""

    def __init__(self, dim: int, rngs: nnx.Rngs):
        self.norm = RMSNorm(dim)
        self.qkv = Conv((), dim, 3 * dim, rngs)
        self.proj = Conv((), dim, dim, rngs)

    def __call__(self, x: Float[Array, "B F H W C"], history: History) -> Float[Array, "B F H W C"]:
        dim = x.shape[-1]

        def attend(qkv: Float[Array, "S 3C"]) -> Float[Array, "S C"]:
            q, k, v = jnp.split(qkv, 3, axis=-1)
            scores = jnp.einsum("qc,kc->qk", q * np.float32(dim**-0.5), k, precision=_PRECISION)
            return matmul(jax.nn.softmax(scores, axis=-1), v)

        qkv = self.qkv.pointwise(self.norm(x)).reshape(x.shape[0] * x.shape[1], -1, 3 * dim)
        out = lax.map(attend, qkv)  # frame by frame: the scores of one at 720p are 0.8 GB
        return x + self.proj.pointwise(out.reshape(x.shape))


class Downsample(nnx.Module):
    """Half of H and W, and of F where `temporal`."""

    def __init__(self, dim: int, temporal: bool, rngs: nnx.Rngs):
        self.conv = Conv((3, 3), dim, dim, rngs)
        self.time_conv = Conv((3, 1, 1), dim, dim, rngs) if temporal else None

    def __call__(self, x: Float[Array, "B F H W C"], history: History) -> Float[Array, "B f h w C"]:
        batch, frames = x.shape[:2]
        x = x.reshape(batch * frames, *x.shape[2:])
        x = conv2d(x, self.conv.kernel[...], stride=2, padding=((0, 1), (0, 1)))  # the new row and column are last
        x = x.reshape(batch, frames, *x.shape[1:]) + self.conv.offset
        if self.time_conv is None:
            return x
        past = history.take(x, 1)
        if past is not None:
            return self._halved(jnp.concatenate([past, x], axis=1), self.time_conv)
        if frames == 1:  # the first frame stays a frame of its own
            return x
        return jnp.concatenate([x[:, :1], self._halved(x, self.time_conv)], axis=1)

    def _halved(self, x: Float[Array, "B F H W C"], time_conv: Conv) -> Float[Array, "B f H W C"]:
        """Frames by twos, each with the one before them: F = 2 f + 1."""
        last = x.shape[1] - 3  # first input frame of the last output
        taps = [matmul(x[:, t : t + last + 1 : 2], time_conv.kernel[t, 0, 0]) for t in range(3)]
        return taps[0] + taps[1] + taps[2] + time_conv.offset


class Upsample(nnx.Module):
    """Twice H and W (nearest, then a convolution that halves the channels), and twice F where `temporal`."""

    def __init__(self, dim: int, temporal: bool, rngs: nnx.Rngs):
        self.conv = Conv((3, 3), dim, dim // 2, rngs)
        self.time_conv = Conv((3, 1, 1), dim, 2 * dim, rngs) if temporal else None

    def __call__(self, x: Float[Array, "B F H W C"], history: History) -> Float[Array, "B f 2H 2W c"]:
        if self.time_conv is not None:
            if not history.first:
                x = self._doubled(x, history, self.time_conv)
            else:
                history.skip(x, 2)  # the first frame stays one frame, and later ones don't see it here
                if x.shape[1] > 1:
                    x = jnp.concatenate([x[:, :1], self._doubled(x[:, 1:], history, self.time_conv)], axis=1)
        return _upsample_conv(x, self.conv.kernel[...]) + self.conv.offset

    def _doubled(self, x: Float[Array, "B f H W C"], history: History, time_conv: Conv) -> Float[Array, "B 2f H W C"]:
        pairs = time_conv.causal(x, history)
        pairs = pairs.reshape(*x.shape[:4], 2, x.shape[4])  # channels are (2, C): a frame, then the next
        return jnp.moveaxis(pairs, 4, 2).reshape(x.shape[0], -1, *x.shape[2:])


def _upsample_conv(x: Float[Array, "B F H W C"], kernel: Float[Array, "3 3 C O"]) -> Float[Array, "B F 2H 2W O"]:
    """conv2d of the nearest-neighbour upsampled x, without making that: 4/9 of the products, 1/4 of the input.

    Rows 2y and 2y+1 of the upsampled image are row y. So an even output row sees rows y-1 and y (twice), an odd one y
    (twice) and y+1, and taps on the same row add up. Columns likewise.
    """
    batch, frames, height, width, channels = x.shape
    images = x.reshape(-1, height, width, channels)
    rows = [(kernel[:1], kernel[1:2] + kernel[2:]), (kernel[:1] + kernel[1:2], kernel[2:])]

    def parity(p: int, q: int) -> Array:
        two = jnp.concatenate(rows[p], axis=0)
        columns = (two[:, :1], two[:, 1:2] + two[:, 2:]) if q == 0 else (two[:, :1] + two[:, 1:2], two[:, 2:])
        return conv2d(images, jnp.concatenate(columns, axis=1), padding=((1 - p, p), (1 - q, q)))

    even, odd = (jnp.stack([parity(p, 0), parity(p, 1)], axis=3) for p in (0, 1))  # [N, H, W, 2, O]
    return jnp.stack([even, odd], axis=2).reshape(batch, frames, 2 * height, 2 * width, -1)

"""Folders of training data made without a model: random latents and text states, for tests of what reads them."""

import pathlib

import jax.numpy as jnp
import numpy as np

from fps_jax.config import Task
from fps_train.precompute.buckets import Size
from fps_train.precompute.manifest import Contents, Manifest, Prompt, Sample, write_manifest, write_part
from fps_train.precompute.shards import ShardWriter

Z, TEXT_LEN, TEXT_DIM, IMAGE = 4, 6, 8, (5, 3)


def noise(key: str, *shape: int) -> np.ndarray:
    """bf16, of the key alone."""
    return np.random.default_rng([*key.encode()]).standard_normal(shape).astype(jnp.bfloat16)


def write_data(
    folder: pathlib.Path,
    sizes: dict[str, int],
    *,
    task: Task = "t2v",
    z_dim: int = Z,
    text_len: int = TEXT_LEN,
    text_dim: int = TEXT_DIM,
    image_shape: tuple[int, int] = IMAGE,
    prompts: bool = False,
    shard_bytes: int = 5000,
    workers: int = 1,
    reverse: bool = False,
) -> pathlib.Path:
    """Data of sizes[name] samples in bucket `name`; a sample's clip, text and content keys end in its number.

    prompts: two validation prompts beside the samples. reverse: written in another order.
    """
    folder.mkdir(exist_ok=True)
    shape = image_shape if task != "t2v" else None
    contents = Contents(
        task=task, z_dim=z_dim, text_len=text_len, text_dim=text_dim, image_shape=shape, fps=16, sizes=tuple(sizes), exact=True,
        min_frames=5, dtype="bfloat16", tiling=False, vae="v", text_encoder="t", image_encoder=None if task == "t2v" else "i",
    )  # fmt: skip
    samples = []
    for name, count in sizes.items():
        for i in range(count):
            key = f"{name}-{i}"
            # contents in another order than the samples: what is held out isn't the first of each bucket
            samples.append(Sample(f"clip-{key}", f"text-{key}", f"{i * 7919 % 997:03}-{key}", name, f"{key}.mp4", key))
    if reverse:
        samples.reverse()
    wanted = [Prompt(f"prompt {i}", f"text-p{i}", f"clip-p{i}" if shape else None, next(iter(sizes))) for i in range(2)]
    wanted = wanted if prompts else []
    with ShardWriter(folder / "latents", shard_bytes=shard_bytes, owner="test") as writer:
        for key, size in [(s.clip, s.size) for s in samples] + [(p.clip, p.size) for p in wanted if p.clip]:
            grid = Size.parse(size).latent_grid
            tensors = {} if key.startswith("clip-p") else {"latents": noise(key, z_dim, *grid)}
            if shape:
                tensors |= {"condition": noise(key + "c", z_dim, *grid), "image": noise(key + "i", *shape)}
            writer.add(key, tensors)
    with ShardWriter(folder / "text", shard_bytes=shard_bytes, owner="test") as writer:
        for k, key in enumerate(["empty", *(s.text for s in samples), *(p.text for p in wanted)]):
            writer.add(key, {"text": noise(key, 1 + k % text_len if k else 1, text_dim)})
    for i in range(workers):
        write_part(folder, contents, (i, workers), samples[i::workers], [])
    manifest = Manifest(
        contents=contents, empty_text="empty", prompts=tuple(wanted), root=str(folder), made={}, samples=(), dropped=()
    )
    assert not write_manifest(folder, manifest, workers)
    return folder

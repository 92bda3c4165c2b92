"""Data read back: every record, in words; and decoded latents beside the frames that they came from."""

import pathlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from fps_jax.checkpoints.open import open_model
from fps_jax.media.plots import figure, save_png
from fps_jax.models.vae import decode
from fps_jax.progress import amount_bar
from fps_train.data import Data, open_data
from fps_train.fingerprint import encoder_fingerprint
from fps_train.precompute.buckets import Size
from fps_train.precompute.clips import IMAGES, ClipError
from fps_train.precompute.frames import content_hash, read_frames
from fps_train.precompute.manifest import Sample, read_manifest

_CLIPS, _FRAMES = 6, 3  # on a contact sheet
_CAPTION = 110  # characters of a caption there
_QUIET = (0.2, 3.0)  # deviation of normalised latents beyond which something is worth a look


def check(folder: pathlib.Path) -> str:
    """Read every record of every sample. Returns a report for people: buckets, numbers' ranges, what no sample uses.

    Raises: as `open_data`; ValueError for a damaged record or one with NaN or inf.
    """
    data, manifest = open_data(folder), read_manifest(folder)
    lines = [
        f"{folder}: {data.task}, {sum(b.num_samples for b in data.buckets)} samples, fingerprint {data.fingerprint}"
    ]
    lines.append("  made by " + ", ".join(f"{name} {value}" for name, value in data.fingerprints.items()))
    with amount_bar("read back", sum(map(len, data.samples)), unit="sample") as advance:
        for bucket, samples in zip(data.buckets, data.samples, strict=True):
            numbers = []
            for sample in samples:
                numbers.append(_read(data, sample))
                advance(1)
            mean, deviation, tokens = np.array(numbers).T
            lines.append(
                f"  {bucket.name:16} {len(samples):7} samples, latents {list(bucket.latent_shape)}, mean {mean.mean():.3f}, "
                f"deviation {deviation.min():.3f} to {deviation.max():.3f}, {tokens.mean():.0f} text tokens on average"
            )
            odd = [s.source for s, d in zip(samples, deviation, strict=True) if not _QUIET[0] <= d <= _QUIET[1]]
            if odd:
                lines.append(
                    f"    {len(odd)} with a deviation beyond {_QUIET[0]} to {_QUIET[1]}: {', '.join(odd[:3])} ..."
                )
    lines.append(f"  {len(data.validation_prompts)} validation prompts, {len(manifest.dropped)} clips dropped")
    for reason, count in Counter(one.reason for one in manifest.dropped).most_common():
        lines.append(f"    {count:6}  {reason}")
    lines += _unused(
        data, {p.clip for p in manifest.prompts}, {manifest.empty_text, *(p.text for p in manifest.prompts)}
    )
    return "\n".join(lines)


def _read(data: Data, sample: Sample) -> tuple[float, float, int]:
    """Mean and deviation of a sample's latents, and its text tokens."""
    tensors, text = data.read(sample)
    for name, tensor in {**tensors, "text": text}.items():
        if not np.isfinite(tensor.astype(np.float32)).all():
            raise ValueError(
                f"{name} of {sample.source!r} hold NaN or inf; delete {data.latents_store.places[sample.clip].shard} "
                f"and {data.text_store.places[sample.text].shard} and run fps-precompute again"
            )
    latents = tensors["latents"].astype(np.float32)
    return float(latents.mean()), float(latents.std()), data.text_store.places[sample.text].shapes["text"][0]


def _unused(data: Data, clips: set[Any], texts: set[str]) -> Iterator[str]:
    """Records that no sample needs: of another size, VAE or caption."""
    everything = [sample for samples in data.samples for sample in samples]
    clips |= {sample.clip for sample in everything}
    texts = texts | {sample.text for sample in everything}
    for store, used in ((data.latents_store, clips), (data.text_store, texts)):
        unused = [place for key, place in store.places.items() if key not in used]
        if unused:
            gigabytes = sum(2 * np.prod(shape) for place in unused for shape in place.shapes.values()) / 1e9
            yield f"  {len(unused)} records in {store.folder.name}/ belong to no sample ({gigabytes:.2f} GB)"


def contact_sheet(folder: pathlib.Path, model: str, path: pathlib.Path) -> None:
    """Write a png: of a few clips, from every bucket, first, middle and last frame; above as decoded from the file, below from
    the latents.

    Args:
      model: the checkpoint that the data were made with.
      path: ends in .png, in a folder that exists.
    Raises: ValueError for a checkpoint with another VAE; OSError where the png can't be written.
    """
    data, manifest = open_data(folder), read_manifest(folder)
    opened = open_model(model)
    params = opened.load("vae", np.float32)
    if encoder_fingerprint("vae", params) != data.contents.vae:
        raise ValueError(
            f"checkpoint {model!r} has a VAE with another encoder than data {str(folder)!r} were made with; name that one"
        )
    roots = [pathlib.Path(root) for root in (manifest.root, manifest.made.get("videos")) if root]
    chosen = _chosen(data)
    with figure(
        2 * len(chosen),
        _FRAMES,
        width=9,
        height=0.6 + 3.2 * len(chosen),
        title="Clips and what their latents decode to",
        subtitle=f"{folder}; above: the file's frames, below: decoded latents",
    ) as (sheet, axes):
        for row, sample in enumerate(chosen):
            latents = data.read(sample)[0]["latents"].astype(np.float32)
            decoded = decode(opened.config.vae, params, jnp.asarray(latents)[None])[0] / 2 + 0.5
            frames, note = _source(sample, roots, data.fps)
            places = np.unique(np.linspace(0, len(decoded) - 1, _FRAMES).round().astype(int))
            for axis in axes[2 * row : 2 * row + 2].flat:
                axis.set_axis_off()
            for column, place in enumerate(places):
                for shift, pictures in ((0, frames), (1, decoded)):
                    axis = axes[2 * row + shift, column]
                    if pictures is not None:
                        axis.imshow(np.clip(pictures[place], 0, 1))
                    elif not column:
                        axis.text(0, 0.5, note, transform=axis.transAxes)
            caption = sample.caption if len(sample.caption) <= _CAPTION else sample.caption[: _CAPTION - 3] + "..."
            axes[2 * row, 0].set_title(f"{sample.source}, {sample.size}: {caption}".replace("$", r"\$"), fontsize=8)
        save_png(sheet, path)


def _chosen(data: Data) -> list[Sample]:
    """Samples from all buckets in turn, as many as a sheet has room for."""
    longest = max(map(len, data.samples))
    in_turn = (samples[k] for k in range(longest) for samples in data.samples if k < len(samples))
    return [sample for sample, _ in zip(in_turn, range(_CLIPS), strict=False)]


def _source(sample: Sample, roots: list[pathlib.Path], fps: int) -> tuple[np.ndarray | None, str]:
    """The sample's frames, in [0, 1], or why there are none."""
    path = next((root / sample.source for root in roots if (root / sample.source).is_file()), None)
    if path is None:
        return None, f"{sample.source} is no longer there"
    if content_hash(path) != sample.content:
        return None, f"{sample.source} has changed"
    try:
        size, is_image = Size.parse(sample.size), path.suffix.lower() in IMAGES
        return read_frames(path, is_image=is_image, fps=fps, **size._asdict()) / np.float32(255), ""
    except ClipError as error:
        return None, f"{sample.source}: {error}"

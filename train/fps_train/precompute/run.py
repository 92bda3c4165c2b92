"""The whole of fps-precompute: find, look, plan, show, encode, list."""

import collections
import contextlib
import fcntl
import functools
import pathlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from fps_jax.checkpoints.open import Model, open_model
from fps_jax.checkpoints.placement import visiting
from fps_jax.choices import Dtype
from fps_jax.files import check_space
from fps_jax.models.tokenizer import Tokenizer, clean
from fps_jax.progress import amount_bar
from fps_jax.sampling.encoding import GIVEN_FRAMES
from fps_jax.sizes import latent_grid
from fps_train.precompute.buckets import Placed, Rule, Size, table
from fps_train.precompute.clips import ClipError, Dropped, find_clips
from fps_train.precompute.encode import Encoders, LatentsMaker, clip_key, encode_texts, text_key, token_ids
from fps_train.precompute.frames import content_hash, read_frames
from fps_train.precompute.manifest import (
    MANIFEST,
    Contents,
    Manifest,
    Prompt,
    Sample,
    read_manifest,
    write_manifest,
    write_part,
)
from fps_train.precompute.prompts import Wanted, read_images, read_prompts
from fps_train.precompute.scan import scan
from fps_train.precompute.shards import ShardWriter, Store, Tensors

_AHEAD = 2  # clips that are decoded while one is encoded


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What to make, and from what. See `fps_train.commands.precompute.Precompute` for the fields of the same names.

    Attributes:
      sizes: buckets; `exact` False: a single one, whose num_frames is the largest number of frames.
      worker: (i, n): this is worker i of n, counted from 0.
    """

    model: str
    videos: pathlib.Path | None
    captions: pathlib.Path | None
    output: pathlib.Path
    sizes: tuple[Size, ...]
    exact: bool
    min_frames: int = 5
    fps: int = 16
    validation_prompts: pathlib.Path | None = None
    worker: tuple[int, int] = (0, 1)
    dtype: Dtype = "bfloat16"
    vae_tiling: bool = False
    shard_bytes: int = 128 << 20
    replace: bool = False
    dry_run: bool = False


class _Work(NamedTuple):
    """What one clip, or one validation prompt's images, needs: `make` decodes, then `encode` makes the tensors."""

    key: str
    source: str
    size: Size
    decode: Callable[[], Any]
    encode: Callable[[LatentsMaker, Any], Tensors]


def precompute(recipe: Recipe, tell: Callable[[str], None] = print) -> None:
    """Make `recipe.output`, or bring it up to date. `tell` gets the table and what was written.

    Raises: OSError, ValueError or NotImplementedError in one line; whatever was whole by then is kept and found by the next run.
    """
    clips, dropped = find_clips(recipe.videos, recipe.captions)
    clips, dropped = _share(clips, recipe.worker), _share(dropped, recipe.worker)
    _check_output(recipe.output)
    model = open_model(recipe.model)
    task, text_len = model.config.task, model.config.dit.text_len
    if task != "t2v" and "image_encoder" not in model.components:
        raise ValueError(
            f"checkpoint {recipe.model!r} has no image tower, and {task} data hold its tokens; use one that has it"
        )
    if task != "t2v" and recipe.min_frames < 5:
        raise ValueError(
            f"min_frames={recipe.min_frames} leaves {task} nothing to predict after the given frames; use 5 or more"
        )
    wanted = read_prompts(recipe.validation_prompts, task)
    rule = Rule(recipe.sizes, recipe.exact, recipe.min_frames, recipe.fps, task)
    tokenizer = Tokenizer.from_directory(model.tokenizer_dir)

    memory = recipe.output / "scan" / f"{recipe.worker[0]:05d}-of-{recipe.worker[1]:05d}.json"
    scanned, unreadable = scan(clips, rule, None if recipe.dry_run else memory)
    placed, misfits = _place(scanned, rule)
    dropped = [*dropped, *unreadable, *misfits]
    ids, cut = token_ids(tokenizer, [one.clip.caption for one in placed], text_len)
    tell(table(placed, dropped, rule, texts_cut=cut, text_len=text_len))
    _check_plan(placed, rule, recipe)
    if recipe.dry_run:
        return
    with _alone(recipe.output, recipe.worker):
        _make(recipe, rule, model, placed, ids, dropped, wanted, tokenizer, tell)


def _make(
    recipe: Recipe,
    rule: Rule,
    model: Model,
    placed: list[Placed],
    ids: list[list[int]],
    dropped: list[Dropped],
    wanted: list[Wanted],
    tokenizer: Tokenizer,
    tell: Callable[[str], None],
) -> None:
    output, config = recipe.output, model.config
    encoders = Encoders(model, recipe.dtype, output / "encoders.json")
    vae = encoders.fingerprint("vae")
    tower = None if config.task == "t2v" else encoders.fingerprint("image_encoder")
    key = functools.partial(
        clip_key, fps=recipe.fps, config=config, vae=vae, tower=tower, tiling=recipe.vae_tiling
    )  # fmt: skip
    _check_replaces(recipe, rule, vae, tower)

    work = {}
    for one in placed:
        size, clip = one.size, one.clip
        decode = functools.partial(read_frames, clip.path, is_image=clip.is_image, fps=recipe.fps, **size._asdict())
        made = key([one.content], size)
        work[made] = _Work(made, clip.source, size, decode, lambda maker, pixels: maker.clip(pixels))
    prompt_clips: list[str | None] = []
    for one in wanted:
        size, images = rule.sizes[0], one.images
        made = key([content_hash(path) for path in images], size) if images else None
        prompt_clips.append(made)
        if made is not None:
            decode = functools.partial(read_images, images, size)
            work[made] = _Work(
                made, str(images[0]), size, decode, lambda maker, frames, n=size.num_frames: maker.given(frames, n)
            )
    failed = _encode_clips(recipe, encoders, list(work.values()))
    encoders.release()

    text = encoders.fingerprint("text_encoder")
    prompt_ids, _ = token_ids(tokenizer, ["", *(one.prompt for one in wanted)], config.dit.text_len)
    keys = [text_key(tokens, encoder=text, dtype=recipe.dtype) for tokens in [*ids, *prompt_ids]]
    _encode_texts(recipe, encoders, dict(zip(keys, [*ids, *prompt_ids], strict=True)))
    encoders.release()

    samples = []
    for one, its_text in zip(placed, keys, strict=False):
        its_clip = key([one.content], one.size)
        if its_clip not in failed:
            source, caption = one.clip.source, one.clip.caption
            samples.append(Sample(its_clip, its_text, one.content, one.size.name, source, caption))
    late = [Dropped(source=one.clip.source, reason=str(failed[k]), detail=failed[k].detail)
            for one in placed if (k := key([one.content], one.size)) in failed]  # fmt: skip
    contents = _contents(recipe, rule, model, vae, text, tower)
    write_part(output, contents, recipe.worker, samples, [*dropped, *late])
    empty, *prompt_keys = keys[len(placed) :]
    prompts = zip(wanted, prompt_keys, prompt_clips, strict=True)
    manifest = Manifest(
        contents=contents,
        empty_text=empty,
        prompts=tuple(Prompt(one.prompt, t, c, rule.sizes[0].name) for one, t, c in prompts),
        root=str((recipe.captions.parent if recipe.captions else recipe.videos or pathlib.Path()).absolute()),
        made=_made(recipe),
        samples=(),
        dropped=(),
    )
    missing = write_manifest(output, manifest, recipe.worker[1])
    for one in late:
        tell(f"dropped while encoding: {one.source}: {one.reason} ({one.detail})")
    tell(f"wrote {len(samples)} samples to {output}")
    if missing:
        names = ", ".join(f"{i}/{recipe.worker[1]}" for i in missing)
        tell(f"not finished before the other workers are: {names}")


def _share(items: Sequence[Any], worker: tuple[int, int]) -> list[Any]:
    """A worker's share, by a hash of the source: the same whatever other clips there are."""
    import zlib

    return [one for one in items if zlib.crc32(one.source.encode(errors="surrogatepass")) % worker[1] == worker[0]]


def _place(scanned: Sequence[Any], rule: Rule) -> tuple[list[Placed], list[Dropped]]:
    placed: list[Placed] = []
    dropped: list[Dropped] = []
    seen: dict[Any, str] = {}
    for clip, content, probe in scanned:
        try:
            one = rule.place(clip, content, probe)
        except ClipError as error:
            dropped.append(Dropped(source=clip.source, reason=str(error), detail=error.detail))
            continue
        first = seen.setdefault((content, one.size, clean(clip.caption)), clip.source)
        if first is not clip.source:
            dropped.append(Dropped(source=clip.source, reason="the same clip and caption twice", detail=f"as {first}"))
        else:
            placed.append(one)
    return placed, dropped


def _check_plan(placed: Sequence[Placed], rule: Rule, recipe: Recipe) -> None:
    """An empty bucket is an error where it can be known: with one worker. `open_data` knows it of all of them."""
    if recipe.worker[1] > 1:
        return
    if not placed:
        raise ValueError("no clip is left to encode; the table says why each was dropped")
    if rule.exact:
        filled = {one.size for one in placed}
        for size in rule.sizes:
            if size not in filled:
                raise ValueError(f"bucket {size.name} gets no clip; leave it out of --buckets")


def _check_output(output: pathlib.Path) -> None:
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"output={str(output)!r} is a file; name a folder")
    if not output.absolute().parent.is_dir():
        raise FileNotFoundError(f"output folder {str(output.absolute().parent)!r} doesn't exist; make it first")
    if output.is_dir():
        names = {path.name for path in output.iterdir()}
        if names and not names & {MANIFEST, "scan", "encoders.json"}:
            raise FileExistsError(f"output={str(output)!r} holds other files ({min(names)!r}); name a new folder")


def _check_replaces(recipe: Recipe, rule: Rule, vae: str, tower: str | None) -> None:
    """Captions, clips and the text encoder may change; data of another size or VAE would silently take the place of these."""
    if recipe.replace or not (recipe.output / MANIFEST).is_file():
        return
    old = read_manifest(recipe.output).contents
    now = (rule.task, rule.fps, tuple(s.name for s in rule.sizes), rule.exact, recipe.vae_tiling, vae, tower)
    before = (old.task, old.fps, old.sizes, old.exact, old.tiling, old.vae, old.image_encoder)
    if now != before:
        names = ("task", "fps", "sizes", "exact", "vae_tiling", "vae", "image_encoder")
        name, was, is_now = next((n, b, a) for n, a, b in zip(names, now, before, strict=True) if a != b)
        raise ValueError(
            f"output={str(recipe.output)!r} holds data with {name} {was}, not {is_now}; name another or --replace"
        )


@contextlib.contextmanager
def _alone(output: pathlib.Path, worker: tuple[int, int]) -> Iterator[None]:
    """The lock of a worker's place; the system gives it back however the process ends."""
    output.mkdir(exist_ok=True)
    with (output / f".worker-{worker[0]}-of-{worker[1]}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another process is worker {worker[0]}/{worker[1]} on {str(output)!r}; wait for it"
            ) from None
        yield


def _encode_clips(recipe: Recipe, encoders: Encoders, work: Sequence[_Work]) -> dict[str, ClipError]:
    """Encode what isn't there yet, a bucket after the other. Returns those that couldn't be, by key."""
    store = Store(recipe.output / "latents")
    todo = sorted((one for one in work if one.key not in store), key=lambda one: (one.size, one.key), reverse=True)
    if not todo:
        return {}
    config = encoders.model.config
    amounts = {one.key: int(np.prod(latent_grid(**one.size._asdict()))) for one in todo}
    latents = 1 if config.task == "t2v" else 2
    check_space(recipe.output, sum(2 * latents * config.vae.z_dim * n for n in amounts.values()))
    failed: dict[str, ClipError] = {}
    owner = f"{recipe.worker[0]}-of-{recipe.worker[1]}"
    with contextlib.ExitStack() as stack:
        tower = None
        if config.task != "t2v":  # it lives in host memory; on the device for the whole phase, not anew for each clip
            tower = stack.enter_context(visiting(encoders.params("image_encoder")))
        maker = LatentsMaker(config=config, vae=encoders.params("vae"), tower=tower, tiling=recipe.vae_tiling)
        writer = stack.enter_context(ShardWriter(store.folder, shard_bytes=recipe.shard_bytes, owner=owner))
        advance = stack.enter_context(amount_bar("encode clips", sum(amounts.values())))
        for done, (one, decoded) in enumerate(_decoded_ahead(todo), 1):
            try:
                writer.add(one.key, one.encode(maker, decoded.result()), {"source": one.source, "size": one.size.name})
            except ClipError as error:
                failed[one.key] = error.with_traceback(None)  # which holds this frame, and with it the VAE's weights
            except FloatingPointError as error:
                raise FloatingPointError(f"{one.source}: {error}; check the checkpoint's VAE") from None
            advance(amounts[one.key], f"{done} of {len(todo)} clips")
    return failed


def _decoded_ahead(todo: Sequence[_Work]) -> Iterator[tuple[_Work, Future[Any]]]:
    waiting: collections.deque[tuple[_Work, Future[Any]]] = collections.deque()
    pool = ThreadPoolExecutor(_AHEAD)
    try:
        for one in todo:
            waiting.append((one, pool.submit(one.decode)))
            if len(waiting) > _AHEAD:
                yield waiting.popleft()
        while waiting:
            yield waiting.popleft()
    finally:
        pool.shutdown(cancel_futures=True)


def _encode_texts(recipe: Recipe, encoders: Encoders, tokens: dict[str, list[int]]) -> None:
    store = Store(recipe.output / "text")
    todo = {key: tokens[key] for key in sorted(tokens) if key not in store}
    if not todo:
        return
    config = encoders.model.config
    check_space(recipe.output, sum(2 * config.dit.text_dim * len(ids) for ids in todo.values()))
    owner = f"{recipe.worker[0]}-of-{recipe.worker[1]}"
    with (
        ShardWriter(store.folder, shard_bytes=recipe.shard_bytes, owner=owner) as writer,
        amount_bar("encode texts", len(todo), unit="text") as advance,
    ):
        for key, tensors in encode_texts(config, encoders.params("text_encoder"), todo, dtype=encoders.dtype):
            writer.add(key, tensors)
            advance(1)


def _contents(recipe: Recipe, rule: Rule, model: Model, vae: str, text: str, tower: str | None) -> Contents:
    config, image = model.config, model.config.image_encoder
    given = len(GIVEN_FRAMES[config.task])
    return Contents(
        task=config.task,
        z_dim=config.vae.z_dim,
        text_len=config.dit.text_len,
        text_dim=config.dit.text_dim,
        image_shape=(given * image.num_tokens, image.dim) if given and image is not None else None,
        fps=rule.fps,
        sizes=tuple(size.name for size in rule.sizes),
        exact=rule.exact,
        min_frames=rule.min_frames,
        dtype=recipe.dtype,
        tiling=recipe.vae_tiling,
        vae=vae,
        text_encoder=text,
        image_encoder=tower,
    )


def _made(recipe: Recipe) -> dict[str, Any]:
    import fps_jax

    paths = ("videos", "captions", "validation_prompts")
    named = {name: None if (p := getattr(recipe, name)) is None else str(p.absolute()) for name in paths}
    return {"model": recipe.model, **named, "version": fps_jax.__version__}

"""A whole checkpoint of a few megabytes with random weights, for tests and benchmarks that need one for its parts, not its videos.

The diffusers layout with Wan's own patches, text length and latent channels, and a tokenizer of some 150 pieces.
"""

import collections
import math
import pathlib
import tempfile

from fps_convert.synthetic import write_checkpoint
from fps_jax.config import DiTConfig, TextEncoderConfig, VAEConfig, WanConfig

# Enough English to spell any prompt; the model doesn't understand it anyway.
_TEXT = """
A cat walks in the snow. A red panda climbs slowly up a tree in the morning light while a small bird sings on a branch.
Two people sail a wooden boat across a quiet lake; the camera follows them from above as clouds drift over the mountains.
Cinematic wide shot, shallow depth of field, film grain, golden hour, high quality, smooth motion, detailed textures.
The quick brown fox jumps over the lazy dog. Pack my box with five dozen liquor jugs. 0 1 2 3 4 5 6 7 8 9 , . ; : ! ? ' " ( ) -
"""

SMALL = WanConfig(
    dit=DiTConfig(task="t2v", dim=96, mlp_dim=192, num_heads=3, num_layers=2, text_dim=32),
    vae=VAEConfig(base_dim=4),
    text_encoder=TextEncoderConfig(vocab_size=320, dim=32, mlp_dim=64, num_heads=4, head_dim=8, num_layers=2),
    flow_shift=3.0,
)


def write_tokenizer(directory: pathlib.Path) -> None:
    """A tokenizer.json of UMT5's kind (unigram, metaspace, `</s>` appended): the paragraph's letters and words.

    Counted, not trained: the library's trainer gives another one each time.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

    words = collections.Counter(f"▁{word}" for word in _TEXT.split())
    letters = collections.Counter(letter for word, count in words.items() for letter in word * count)
    counts = letters + words
    total = sum(counts.values())
    # By count, then by themselves; a piece's score is the logarithm of its share.
    ranked = sorted(counts, key=lambda piece: (-counts[piece], piece))
    vocabulary = [(name, 0.0) for name in ("<pad>", "</s>", "<unk>")]
    vocabulary += [(piece, math.log(counts[piece] / total)) for piece in ranked]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=2))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])  # pyright: ignore[reportAttributeAccessIssue]
    directory.mkdir(parents=True)
    tokenizer.save(str(directory / "tokenizer.json"), pretty=False)


def write_small_checkpoint(path: pathlib.Path) -> None:
    """Writes it, the same every time. DiT and text encoder bf16, VAE float32. Replaces what is there."""
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(pathlib.Path(folder) / "tokenizer")
        tokenizer = pathlib.Path(folder) / "tokenizer"
        dtypes = {"dit": "BF16", "text_encoder": "BF16"}
        write_checkpoint(path, SMALL, layout="diffusers", tokenizer_dir=tokenizer, dtypes=dtypes, overwrite=True)

"""Writes the checkpoint that `make demo` samples: the diffusers layout, synthetic weights, a tokenizer of 300 pieces.

    python -m fps_convert.make_demo fps_jax/demo_checkpoint

Only needed to make fps_jax/demo_checkpoint anew; the result is the same every time.
"""

import pathlib
import sys
import tempfile

from fps_convert.synthetic import write_checkpoint
from fps_jax.config import DiTConfig, TextEncoderConfig, VAEConfig, WanConfig

# Enough English to spell any prompt; the synthetic model doesn't understand it anyway.
_TEXT = """
A cat walks in the snow. A red panda climbs slowly up a tree in the morning light while a small bird sings on a branch.
Two people sail a wooden boat across a quiet lake; the camera follows them from above as clouds drift over the mountains.
Cinematic wide shot, shallow depth of field, film grain, golden hour, high quality, smooth motion, detailed textures.
The quick brown fox jumps over the lazy dog. Pack my box with five dozen liquor jugs. 0 1 2 3 4 5 6 7 8 9 , . ; : ! ? ' " ( ) -
"""

DEMO = WanConfig(
    dit=DiTConfig(task="t2v", dim=96, mlp_dim=192, num_heads=3, num_layers=2, text_dim=32),
    vae=VAEConfig(base_dim=4),
    text_encoder=TextEncoderConfig(vocab_size=320, dim=32, mlp_dim=64, num_heads=4, head_dim=8, num_layers=2),
    flow_shift=3.0,
)


def write_tokenizer(directory: pathlib.Path) -> None:
    """A tokenizer.json of UMT5's kind (unigram, metaspace, `</s>` appended), trained on a paragraph."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()  # pyright: ignore[reportAttributeAccessIssue]
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(_TEXT.strip().splitlines(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])  # pyright: ignore[reportAttributeAccessIssue]
    directory.mkdir(parents=True)
    tokenizer.save(str(directory / "tokenizer.json"), pretty=False)


def main() -> None:
    path = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else "fps_jax/demo_checkpoint")
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(pathlib.Path(folder) / "tokenizer")
        tokenizer = pathlib.Path(folder) / "tokenizer"
        dtypes = {"dit": "BF16", "text_encoder": "BF16"}
        write_checkpoint(path, DEMO, layout="diffusers", tokenizer_dir=tokenizer, dtypes=dtypes, overwrite=True)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()

"""The small model that the claim is shown on: Wan2.1's classes, small, with a vocabulary of the world's own words.

    python -m benchmarks.claim.model OUT [--vae RUN/checkpoint]

writes a checkpoint to train from: VAE as given, DiT and text encoder random. The text encoder stays as it is: the captions' few
words get random, fixed states, and the DiT's own text embedding learns what they mean.
"""

import dataclasses
import pathlib
import sys
import tempfile
from dataclasses import dataclass

from benchmarks.claim import world
from fps_jax.config import DiTConfig, SamplingDefaults, TextEncoderConfig, VAEConfig, WanConfig
from fps_jax.errors import parse, run_cli

TEXT_LEN = 20
Z_DIM = 6
SPECIAL = ("<pad>", "</s>", "<unk>")

DIT = DiTConfig(
    task="t2v",
    dim=128,
    mlp_dim=256,
    num_heads=4,
    num_layers=4,
    in_channels=Z_DIM,
    out_channels=Z_DIM,
    patch_size=(1, 1, 1),  # a latent a token: 17 frames of 48 x 64 pixels are (5, 6, 8) tokens, which make 12 tiles
    text_dim=64,
    text_len=TEXT_LEN,
)
TEXT_ENCODER = TextEncoderConfig(vocab_size=128, dim=64, mlp_dim=128, num_heads=2, head_dim=32, num_layers=1)
VAE = VAEConfig(base_dim=8, z_dim=Z_DIM, num_res_blocks=1, latents_mean=(0.0,) * Z_DIM, latents_std=(1.0,) * Z_DIM)
SAMPLING = SamplingDefaults(
    height=world.HEIGHT,
    width=world.WIDTH,
    num_frames=world.FRAMES,
    num_inference_steps=12,
    guidance_scale=2.5,
    negative_prompt="",
)
CONFIG = WanConfig(dit=DIT, vae=VAE, text_encoder=TEXT_ENCODER, flow_shift=5.0, sampling=SAMPLING)


@dataclass(frozen=True, kw_only=True)
class WriteModel:
    """Write the checkpoint that the claim's small model is trained from."""

    output: pathlib.Path
    """Folder of the checkpoint."""
    vae: pathlib.Path | None = None
    """Checkpoint whose VAE to take, of fps-train-vae; a random one if left out."""
    overwrite: bool = False
    """Replace what is there."""


def write_tokenizer(folder: pathlib.Path) -> None:
    """A tokenizer.json of whole words, lower case, marks apart."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    words = {word: number for number, word in enumerate((*SPECIAL, *world.vocabulary()))}
    if len(words) > TEXT_ENCODER.vocab_size:
        raise ValueError(f"the world has {len(words)} words, the text encoder {TEXT_ENCODER.vocab_size}; enlarge it")
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Punctuation()])  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])  # pyright: ignore[reportAttributeAccessIssue]
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)


def write_model(path: pathlib.Path, vae: pathlib.Path | None = None, *, overwrite: bool = False) -> WanConfig:
    """Writes the checkpoint in our format; returns its config. vae: a checkpoint that holds a trained VAE."""
    from fps_convert.synthetic import write_checkpoint
    from fps_convert.torch_to_flax import to_flax
    from fps_jax.checkpoints.format import load_component, save_checkpoint
    from fps_jax.checkpoints.open import open_model

    with tempfile.TemporaryDirectory() as folder:
        temporary = pathlib.Path(folder)
        write_tokenizer(temporary / "tokenizer")
        write_checkpoint(temporary / "torch", CONFIG, layout="diffusers", tokenizer_dir=temporary / "tokenizer")
        to_flax(temporary / "torch", temporary / "ours")
        parts = {name: load_component(temporary / "ours" / name) for name in ("dit", "vae", "text_encoder")}
        config = CONFIG
        if vae is not None:
            trained = open_model(vae)
            config = dataclasses.replace(CONFIG, vae=trained.config.vae)
            parts["vae"] = trained.load("vae", "float32")
        save_checkpoint(path, config, parts, tokenizer_dir=temporary / "tokenizer", overwrite=overwrite)
    return config


def main(argv: list[str] | None = None) -> None:
    """Entry point of the command."""
    sys.exit(run_cli(_main, argv))


def _main(arguments: list[str]) -> None:
    options = parse(WriteModel, arguments, prog="python -m benchmarks.claim.model")
    write_model(options.output, options.vae, overwrite=options.overwrite)
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()

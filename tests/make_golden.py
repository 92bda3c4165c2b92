"""Makes the golden files that no copy of an upstream run gives: CLIP tower, bicubic, FLF2V, text cleaning.

Needs a Python 3.11 environment of its own, and never runs in the test suite:

    python3.11 -m venv /tmp/torch && /tmp/torch/bin/pip install torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 \
        ftfy==6.3.1 accelerate sentencepiece --extra-index-url https://download.pytorch.org/whl/cpu
    /tmp/torch/bin/python tests/make_golden.py

Everything is seeded. Weights are random, rounded to 16 bits (half the bytes) and used in float32. Files, under tests/data:

  clip_tower.safetensors     weights under transformers' keys (config in the metadata), pixels, hidden_states[-2]
  bicubic.safetensors        official CLIP preprocessing of several sizes
  cleaned_text.json          pairs of text and diffusers' prompt_clean
  Wan2.1-FLF2V-tiny-transformer/    a diffusers transformer with first and last frame positions
  flf2v_forward.safetensors  its output on a batch of two
  flf2v_pipeline.safetensors a sampled video, with VAE, text encoder and tokenizer of tests/data/Wan2.1-T2V-tiny-Diffusers
"""

import json
import pathlib

import torch
import torch.nn.functional as F  # noqa: N812
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanImageToVideoPipeline, WanTransformer3DModel
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from safetensors.torch import save_file
from transformers import AutoTokenizer, CLIPVisionConfig, CLIPVisionModel, UMT5EncoderModel

DATA = pathlib.Path(__file__).parent / "data"
T2V = DATA / "Wan2.1-T2V-tiny-Diffusers"

TEXTS = [
    "A cat walks in the snow.",
    "",
    " \t\n ",
    "  double   spaces\tand\nnewlines ",
    "a&amp;amp;lt;b&gt; &quot;q&quot;",
    "sÃ£o paulo â€œquotedâ€\x9d",
    "ＦＵＬＬ width ﬁ ligature",
    "色调艳丽，过曝，\u3000静态",
    "zero\u200bwidth\ufeff and nbsp\u00a0here\u2003em",
    "it\u2019s \u201ccurly\u201d\u2026",
    "ctrl \x1c\x1f\x07 bytes",
    "&#x1c; &#160;&nbsp; entity &#x1F43C;",
    "line\u2028sep\u2029par\x85nel",
    "emoji 👩\u200d👩\u200d👧 e\u0301",
]


def randomise(model: torch.nn.Module, seed: int, dtype: torch.dtype) -> torch.nn.Module:
    """Every parameter random, none zero or symmetric, of a size that keeps activations near 1; exact in `dtype`."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            value = 0.2 * noise + (1 if "norm" in name and name.endswith("weight") else 0)
        elif "scale_shift_table" in name or "embed" in name.rsplit(".", 1)[-1] or "position_embedding" in name:
            value = 0.5 * noise
        else:
            value = noise / parameter[0].numel() ** 0.5
        parameter.data = value.to(dtype).float()
    return model.eval()


def save(name: str, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    path = DATA / f"{name}.safetensors"
    save_file({key: value.detach().contiguous() for key, value in tensors.items()}, path, metadata)
    path.chmod(0o644)
    print(f"{path.relative_to(DATA.parent.parent)}: {path.stat().st_size / 1000:.0f} kB")


def clip_tower() -> None:
    config = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": 56,
        "patch_size": 14,
        "hidden_act": "gelu",
        "projection_dim": 32,
        "layer_norm_eps": 1e-5,
    }
    model = randomise(CLIPVisionModel(CLIPVisionConfig(**config)), 1, torch.float16)  # NumPy has no bfloat16
    pixels = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(2)).half().float()
    states = model(pixel_values=pixels, output_hidden_states=True).hidden_states
    weights = {f"weights.{key}": value.half() for key, value in model.state_dict().items()}
    tensors = weights | {"in.pixel_values": pixels.half(), "out.hidden_states_-2": states[-2]}
    save("clip_tower", tensors, {"config": json.dumps(config)})


def bicubic() -> None:
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    tensors = {}
    for name, batch, height, width in (
        ("down", 2, 40, 61),
        ("up", 1, 9, 13),
        ("same", 1, 28, 28),
        ("wide", 1, 5, 1280),
    ):
        image = torch.rand(batch, height, width, 3, generator=torch.Generator().manual_seed(height)).half().float()
        frames = image.permute(0, 3, 1, 2).sub(0.5).div(0.5)
        frames = F.interpolate(frames, size=(28, 28), mode="bicubic", align_corners=False)
        pixels = frames.mul(0.5).add(0.5).sub(mean).div(std)
        tensors |= {f"{name}.in": image.half(), f"{name}.out": pixels.permute(0, 2, 3, 1)}
    save("bicubic", tensors)


def cleaned_text() -> None:
    pairs = [[text, prompt_clean(text)] for text in TEXTS]
    lines = ",\n".join(json.dumps(pair) for pair in pairs)
    (DATA / "cleaned_text.json").write_text(f"[\n{lines}\n]\n")


TRANSFORMER = {
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "in_channels": 36,
    "out_channels": 16,
    "text_dim": 32,
    "freq_dim": 256,
    "ffn_dim": 128,
    "num_layers": 2,
    "image_dim": 80,
    "added_kv_proj_dim": 64,
}


def image_models() -> None:
    model = WanTransformer3DModel(**TRANSFORMER, pos_embed_seq_len=514)
    randomise(model, 3, torch.bfloat16)
    directory = DATA / "Wan2.1-FLF2V-tiny-transformer"
    directory.mkdir(exist_ok=True)
    weights = {key: value.bfloat16().contiguous() for key, value in model.state_dict().items()}
    path = directory / "diffusion_pytorch_model.safetensors"
    save_file(weights, path, {"format": "pt"})
    path.chmod(0o644)
    model.save_config(directory)

    generator = torch.Generator().manual_seed(4)
    latents = torch.randn(2, 36, 3, 4, 6, generator=generator)
    text = F.pad(torch.randn(2, 24, 32, generator=generator), (0, 0, 0, 488))
    embeds = torch.randn(4, 257, 80, generator=generator).half().float()  # first and last of sample 0, then of sample 1
    timestep = torch.tensor([937, 250])
    velocity = model(
        hidden_states=latents,
        timestep=timestep,
        encoder_hidden_states=text,
        encoder_hidden_states_image=embeds,
        return_dict=False,
    )[0]
    save(
        "flf2v_forward",
        {
            "in.latents": latents,
            "in.timestep": timestep,
            "in.text_first24": text[:, :24],
            "in.image_embeds": embeds.half(),
            "out": velocity,
        },
    )
    image_pipeline("flf2v_pipeline", model, embeds[:2])
    # The image-to-video model is the same one without the learned positions: no second file of weights.
    i2v = WanTransformer3DModel(**TRANSFORMER).eval()
    i2v.load_state_dict({key: value for key, value in model.state_dict().items() if "pos_embed" not in key})
    image_pipeline("i2v_pipeline", i2v, embeds[:1])


def image_pipeline(case: str, model: WanTransformer3DModel, embeds: torch.Tensor) -> None:
    pipe = WanImageToVideoPipeline(
        tokenizer=AutoTokenizer.from_pretrained(T2V / "tokenizer"),
        text_encoder=UMT5EncoderModel.from_pretrained(T2V / "text_encoder").eval(),
        vae=AutoencoderKLWan.from_pretrained(T2V / "vae").eval(),
        scheduler=UniPCMultistepScheduler.from_pretrained(T2V / "scheduler"),
        transformer=model,
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.encode_image = lambda *args: embeds  # the pipeline refuses image and image_embeds together
    tensors = {}
    prepare = pipe.prepare_latents

    def record_condition(*args, **kwargs):
        latents, condition = prepare(*args, **kwargs)
        tensors["condition"] = condition
        return latents, condition

    pipe.prepare_latents = record_condition
    generator = torch.Generator().manual_seed(5)
    latents = torch.randn(1, 16, 3, 4, 6, generator=generator)
    image, last_image = torch.rand(2, 1, 3, 32, 48, generator=generator)
    arguments = {
        "image": image,
        "last_image": last_image if len(embeds) == 2 else None,
        "prompt": "A cat walks in the snow.",
        "negative_prompt": "worst quality, low quality, static",
        "height": 32,
        "width": 48,
        "num_frames": 9,
        "num_inference_steps": 3,
        "guidance_scale": 5.0,
        "max_sequence_length": 512,
    }
    out = pipe(**arguments, latents=latents.clone(), output_type="latent").frames
    settings = {key: value for key, value in arguments.items() if not isinstance(value, torch.Tensor)}
    tensors |= {
        "in.latents": latents,
        "in.image": image[0].permute(1, 2, 0),
        "in.last_image": last_image[0].permute(1, 2, 0),
        "in.image_embeds": embeds.reshape(1, -1, 80).half(),
        "out.latents": out,
    }
    save(case, tensors, {"settings": json.dumps(settings)})


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    torch.set_num_threads(2)
    for make in (clip_tower, bicubic, cleaned_text, image_models):
        make()

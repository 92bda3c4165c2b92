"""Makes tests/data/few_step.safetensors: few-step sampling and named noise levels, by diffusers' pipeline and schedulers.

Needs a Python 3.11 environment of its own, and never runs in the test suite:

    python3.11 -m venv /tmp/torch && /tmp/torch/bin/pip install torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 ftfy==6.3.1
    /tmp/torch/bin/python tests/make_golden_few_step.py

WanPipeline on tests/data/Wan2.1-T2V-tiny-Diffusers, float32, by case (settings in the metadata): `NAME.latents` after each step,
`NAME.sigmas`, `NAME.timesteps`. All start at `in.latents`; step i adds `in.step_noise[i]`, which the schedulers draw themselves
from torch's generator at SEED. What a distilled model's authors run, in FlowMatchLCMScheduler's terms or in Training's:

  few_step   levels of 1000, 750, 500 and 250 shifted by 5 (ModelTC/LightX2V, lightx2v/models/schedulers/wan/step_distill)
  dmd        1000, 757, 522 looked up in 1000 levels at shift 8 (hao-ai-lab/FastVideo, fastvideo/pipelines/stages/denoising.py;
             tianweiy/CausVid, causvid/models/wan/bidirectional_inference.py, the same arithmetic)
"""

import json
import pathlib
from types import SimpleNamespace

import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.utils.torch_utils import randn_tensor
from safetensors.torch import save_file
from transformers import AutoTokenizer, UMT5EncoderModel

DATA = pathlib.Path(__file__).parent / "data"
T2V = DATA / "Wan2.1-T2V-tiny-Diffusers"
SEED = 7
SHAPE = (1, 16, 3, 4, 6)
SIGMAS = [1.0, 0.85, 0.6, 0.2]


class Training:
    """DMD's sampler: timesteps of the training schedule, x0 in float64, noised again to the next one's level."""

    order = 1
    config = SimpleNamespace(num_train_timesteps=1000)

    def __init__(self, timesteps: list[int], shift: float):
        table = FlowMatchEulerDiscreteScheduler(shift=shift)  # as built, it holds all levels of training
        self.timesteps = torch.tensor(timesteps)
        nearest = (table.timesteps.double()[None] - self.timesteps.double()[:, None]).abs().argmin(1)
        self.sigmas = torch.cat([table.sigmas[nearest], torch.zeros(1)])

    def set_timesteps(self, *_, **__):
        pass

    def set_begin_index(self, _):
        self.index = 0

    def step(self, velocity, t, x, **_):
        x0 = (x.double() - self.sigmas[self.index].double() * velocity.double()).float()
        self.index += 1
        sigma = self.sigmas[self.index]
        return ((1 - sigma) * x0 + sigma * randn_tensor(x0.shape) if sigma > 0 else x0,)


def explicit(scheduler, **levels):
    """The scheduler on these levels, whatever number of steps the pipeline asks for."""
    set_timesteps = scheduler.set_timesteps
    scheduler.set_timesteps = lambda *_, device=None, **__: set_timesteps(device=device, **levels)
    return scheduler


CASES = {
    "lcm": (FlowMatchLCMScheduler(shift=5.0), 4, 1.0),
    "lcm_guided": (FlowMatchLCMScheduler(shift=3.0), 3, 4.0),
    "few_step": (explicit(FlowMatchLCMScheduler(shift=5.0), sigmas=[1.0, 0.75, 0.5, 0.25]), 4, 1.0),
    "dmd": (Training([1000, 757, 522], 8.0), 3, 1.0),
    "lcm_sigmas": (explicit(FlowMatchLCMScheduler(shift=1.0), sigmas=SIGMAS), 4, 1.0),
    "euler_sigmas": (explicit(FlowMatchEulerDiscreteScheduler(shift=1.0), sigmas=SIGMAS), 4, 1.0),
    "unipc_sigmas": (
        explicit(
            UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0),
            sigmas=torch.tensor(SIGMAS).double().numpy(),
        ),
        4,
        1.0,
    ),
}


def main() -> None:
    latents = torch.randn(SHAPE, generator=torch.Generator().manual_seed(SEED + 1))
    torch.manual_seed(SEED)
    tensors = {"in.latents": latents, "in.step_noise": torch.stack([randn_tensor(SHAPE) for _ in range(3)])}
    metadata = {}
    for name, (scheduler, steps, guidance) in CASES.items():
        pipe = WanPipeline(
            tokenizer=AutoTokenizer.from_pretrained(T2V / "tokenizer"),
            text_encoder=UMT5EncoderModel.from_pretrained(T2V / "text_encoder").eval(),
            vae=AutoencoderKLWan.from_pretrained(T2V / "vae").eval(),
            scheduler=FlowMatchEulerDiscreteScheduler(),
            transformer=WanTransformer3DModel.from_pretrained(T2V / "transformer").eval(),
        )
        pipe.scheduler = scheduler
        pipe.set_progress_bar_config(disable=True)
        states = []

        def keep(pipe, step, t, kept, states=states):
            states.append(kept["latents"].clone())
            return kept

        arguments = {
            "prompt": "A cat walks in the snow.",
            "negative_prompt": "worst quality, low quality, static",
            "height": 32,
            "width": 48,
            "num_frames": 9,
            "num_inference_steps": steps,
            "guidance_scale": guidance,
            "max_sequence_length": 512,
        }
        torch.manual_seed(SEED)
        pipe(**arguments, latents=latents.clone(), output_type="latent", callback_on_step_end=keep)
        tensors |= {
            f"{name}.latents": torch.stack(states),
            f"{name}.sigmas": scheduler.sigmas,
            f"{name}.timesteps": scheduler.timesteps.float(),
        }
        metadata[name] = json.dumps(arguments)
    path = DATA / "few_step.safetensors"
    save_file({name: value.contiguous() for name, value in tensors.items()}, path, metadata)
    path.chmod(0o644)
    print(f"{path.relative_to(DATA.parent.parent)}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    main()

"""Makes tests/data/lora.safetensors: what diffusers makes of LoRA files in each spelling that it reads.

Needs a Python 3.11 environment of its own, and never runs in the test suite:

    python3.11 -m venv /tmp/torch && /tmp/torch/bin/pip install torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 peft==0.21.2
    /tmp/torch/bin/python tests/make_golden_lora.py

Each file of `lora_spellings.CASES` is loaded into a tiny transformer of tests/data with WanPipeline.load_lora_weights. By case:
`SCALE.probe.NAME`, each parameter that fuse_lora changes times a fixed vector, in float64 (a whole matrix would be a hundred times
as large); for some cases `velocity`, one evaluation at scale 1 with the adapters beside the weights, as diffusers runs them, on
the inputs of that model's own golden file (`dit_t2v_single`, `flf2v_forward`).
"""

import json
import pathlib
import tempfile

import diffusers
import lora_spellings
import numpy as np
import peft
import torch
import torch.nn.functional as F  # noqa: N812
from diffusers import WanPipeline, WanTransformer3DModel
from safetensors.numpy import save_file
from safetensors.torch import load_file

DATA = pathlib.Path(__file__).parent / "data"
MODELS = {"t2v": DATA / "Wan2.1-T2V-tiny-Diffusers" / "transformer", "flf2v": DATA / "Wan2.1-FLF2V-tiny-transformer"}
HALF = ("ours", "down_up", "kohya")  # also at scale 0.5
EVALUATED = ("ours", "down_up", "outside", "image")


def inputs() -> dict[str, dict[str, torch.Tensor]]:
    """By model: what it's evaluated on, those of its own golden files."""
    given = {}
    for model, case in (("t2v", "dit_t2v_single"), ("flf2v", "flf2v_forward")):
        given[model] = {name: value.float() for name, value in load_file(DATA / f"{case}.safetensors").items()}
    t2v, flf2v = given["t2v"], given["flf2v"]
    text = t2v["in.context0"][None], flf2v["in.text_first24"]
    padded = [F.pad(states, (0, 0, 0, 512 - states.shape[1])) for states in text]
    return {
        "t2v": {"hidden_states": t2v["in.x0"][None], "timestep": t2v["in.t"], "encoder_hidden_states": padded[0]},
        "flf2v": {
            "hidden_states": flf2v["in.latents"],
            "timestep": flf2v["in.timestep"],
            "encoder_hidden_states": padded[1],
            "encoder_hidden_states_image": flf2v["in.image_embeds"],
        },
    }


def probe(parameter: torch.Tensor) -> np.ndarray:
    values = parameter.detach().double().numpy()
    return values.reshape(len(values), -1) @ np.linspace(-1, 1, values[0].size) if values.ndim > 1 else values


def run(
    directory: pathlib.Path, path: pathlib.Path, scale: float, given: dict[str, torch.Tensor]
) -> tuple[np.ndarray, dict]:
    model = WanTransformer3DModel.from_pretrained(directory).eval()
    before = {name: probe(parameter) for name, parameter in model.float().named_parameters()}
    pipe = WanPipeline(tokenizer=None, text_encoder=None, vae=None, scheduler=None, transformer=model)
    pipe.load_lora_weights(path, adapter_name="case")
    pipe.set_adapters(["case"], [scale])
    velocity = model(**given, return_dict=False)[0]
    # Its scale is that of set_adapters; fuse_lora's own comes on top.
    pipe.fuse_lora(components=["transformer"], safe_fusing=True)
    pipe.unload_lora_weights()
    after = {name: probe(parameter) for name, parameter in model.named_parameters()}
    assert after.keys() == before.keys()
    return velocity.numpy(), {name: after[name] for name in after if not np.array_equal(after[name], before[name])}


def main() -> None:
    given = inputs()
    tensors = {}
    for case, (files, metadata) in lora_spellings.CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / f"{case}.safetensors"
            save_file({key: np.asarray(value) for key, value in files.items()}, path, metadata)
            task = "flf2v" if case == "image" else "t2v"
            for scale in (1.0, 0.5) if case in HALF else (1.0,):
                velocity, probes = run(MODELS[task], path, scale, given[task])
                print(case, scale, len(probes), "parameters changed")
                tensors |= {f"{case}.{scale:g}.probe.{name}": value for name, value in probes.items()}
                if scale == 1 and case in EVALUATED:
                    tensors[f"{case}.velocity"] = velocity
    versions = {module.__name__: module.__version__ for module in (diffusers, peft, torch)}
    path = DATA / "lora.safetensors"
    save_file(tensors, path, {"versions": json.dumps(versions)})
    path.chmod(0o644)
    print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB, {versions}")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    main()

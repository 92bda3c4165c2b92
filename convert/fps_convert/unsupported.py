"""Models of Wan's family that aren't supported, by name: a person should learn what a file is, not which tensor is too many."""

import pathlib
import re
from collections.abc import Iterable

from fps_jax.files import read_json

SUPPORTED = "supported are Wan2.1 T2V, I2V and FLF2V"
# Tensors of a DiT, by the beginning of their keys or anywhere in them, that no such model has.
_TENSORS = (
    (r"^vace_", "a VACE model"),
    (
        r"\.to_gate_compress\.",
        "trained with another attention (FastVideo's VSA: to_gate_compress is a branch of it), without which it is another model",
    ),
    (r"^(face_|motion_encoder|pose_patch_embedding)", "a Wan2.2 Animate model"),
    (r"^(audio|casual_audio|frame_packer|trainable_cond_mask)", "a model driven by sound (Wan2.2 S2V and kin)"),
    (r"^(control_|ref_conv|cam_encoder)|\.cam_encoder\.", "a control model (Wan-Fun and kin)"),
    (r"^fps_(embedding|projection)", "a SkyReels-V2 model with diffusion forcing"),
    (r"\.(absmax|quant_map)$|\.quant_state\.", "quantized by bitsandbytes (NF4 or INT8)"),
)
_MODEL_TYPES = {"vace": "a VACE model", "s2v": "a Wan2.2 S2V model", "animate": "a Wan2.2 Animate model"}
_PIPELINES = {
    "WanCausalDMDPipeline": "a causal few-step model (WanCausalDMDPipeline): it makes a video block by block",
    "WanVACEPipeline": "a VACE model",
    "WanAnimatePipeline": "a Wan2.2 Animate model",
}
_WAN22_FOLDERS = ("high_noise_model", "low_noise_model")
# Names of files and repositories that say what they hold, where its tensors are those of a supported model or of other channels.
_NAMES = (
    (re.compile(r"(high|low)[_\-. ]?noise|wan[_\-. ]?2[_\-. ]?2", re.IGNORECASE), "a Wan2.2 model by its name"),
    (re.compile(r"fun[_\-. ].*control", re.IGNORECASE), "a control model (Wan-Fun) by its name"),
    (re.compile(r"(^|[_\-. /])vace($|[_\-. ])", re.IGNORECASE), "a VACE model by its name"),
)


def _refuse(where: pathlib.Path, what: str) -> NotImplementedError:
    return NotImplementedError(f"{where} is {what}; {SUPPORTED}")


def check_dit(keys: Iterable[str], config: dict, where: pathlib.Path) -> None:
    """Raises NotImplementedError, saying what it is, for a DiT with parts that no supported model has."""
    model_type = str(config.get("model_type"))
    if model_type in _MODEL_TYPES:
        raise _refuse(where, _MODEL_TYPES[model_type])
    keys = list(keys)
    for pattern, what in _TENSORS:
        found = next((key for key in keys if re.search(pattern, key)), None)
        if found is not None:
            raise _refuse(where, f"{what} (it has tensor {found!r})")


def check_vae(keys: Iterable[str], config: dict, where: pathlib.Path) -> None:
    """Raises NotImplementedError for the VAE of Wan2.2: residual, patched, 48 channels."""
    pattern = re.compile(r"samples\.\d+\.(down|up)samples\.|avg_shortcut|down_blocks\.\d+\.(resnets|downsampler)")
    if any(pattern.search(key) for key in keys) or config.get("is_residual") or config.get("patch_size") is not None:
        raise NotImplementedError(f"{where} is a Wan2.2 VAE (residual, patched); only Wan2.1's VAE is supported")


def gguf(where: pathlib.Path | str) -> NotImplementedError:
    """The error that says what GGUF is."""
    return NotImplementedError(f"{where} is GGUF, which isn't supported; use a safetensors file, FP8 for the smallest")


def check_file(file: pathlib.Path) -> None:
    """Raises NotImplementedError for a file whose name or first bytes say what it is: GGUF, a DiT of another model."""
    check_gguf(file)
    check_name(file.name, file)
    if file.parent.name in _WAN22_FOLDERS:
        raise _refuse(file, "a part of a Wan2.2 model by its folder")


def check_name(name: str, where: pathlib.Path) -> None:
    """Raises NotImplementedError for a name of a file or a repository that says it is another model."""
    for pattern, what in _NAMES:
        if pattern.search(name):
            raise _refuse(where, what)


def check_gguf(file: pathlib.Path) -> None:
    """Raises NotImplementedError for a GGUF file, by its name or first bytes."""
    if file.suffix.lower() == ".gguf" or (file.is_file() and _begins(file, b"GGUF")):
        raise gguf(file)


def _begins(file: pathlib.Path, magic: bytes) -> bool:
    with file.open("rb") as opened:
        return opened.read(len(magic)) == magic


def check_channels(ins: int, outs: int, has_image: bool, where: pathlib.Path) -> None:
    """Raises NotImplementedError for a DiT whose channels are those of no supported task; ins and outs of its latents."""
    if ins == (2 * outs + 4 if has_image else outs):
        return
    kin = {2 * outs + 4: "; Wan2.2's I2V has these", 3 * outs: "; Wan-Fun's control models have these"}.get(ins, "")
    raise NotImplementedError(
        f"{where}: {ins} input and {outs} output channels {'with' if has_image else 'without'} image attention is "
        f"no Wan2.1 T2V (as many in as out), I2V or FLF2V model (2 x out + 4 in, with image attention){kin}"
    )


def check_vae_fits(channels: int, z_dim: int, where: pathlib.Path) -> None:
    """Raises NotImplementedError for Wan2.2's TI2V-5B beside another VAE than its own."""
    if channels == 48 and z_dim != 48:
        raise _refuse(where, f"a DiT of 48 channels, as Wan2.2's TI2V-5B, beside a VAE of {z_dim}")


def names_class(index: dict, name: str) -> bool:
    """Whether a model_index.json has a model of this name: [library, class], where [null, null] is none."""
    entry = index.get(name)
    return isinstance(entry, list) and bool(entry) and entry[0] is not None


def check_directory(path: pathlib.Path, names: Iterable[str], index: dict) -> None:
    """What a checkpoint is, by the names in it and its model_index.json, before any weights: also of a repository's listing.

    Args:
      names: paths of its files, with slashes, relative to it.
      index: its model_index.json, empty without one.
    Raises: NotImplementedError.
    """
    if path.name in _WAN22_FOLDERS:
        raise _refuse(path, "a part of a Wan2.2 checkpoint by its name")
    tops = {name.split("/")[0] for name in names}
    if names_class(index, "transformer_2") or "transformer_2" in tops:
        raise _refuse(path, "a Wan2.2 checkpoint (it has a transformer_2)")
    if tops & set(_WAN22_FOLDERS):
        raise _refuse(path, f"a Wan2.2 checkpoint (it has a {min(tops & set(_WAN22_FOLDERS))})")
    if any(top.lower().startswith("wan2.2_vae") for top in tops):
        raise _refuse(path, "a Wan2.2 checkpoint (it has a Wan2.2 VAE)")
    pipeline = str(index.get("_class_name"))
    if pipeline in _PIPELINES:
        raise _refuse(path, _PIPELINES[pipeline])


def check_jsons(path: pathlib.Path, names: Iterable[str]) -> None:
    """`check_directory` of a folder that has its JSON files, and of the configs of its DiT and VAE."""
    index = path / "model_index.json"
    check_directory(path, names, read_json(index) if index.is_file() else {})
    for name in ("config.json", "transformer/config.json"):
        if (path / name).is_file():
            check_dit([], read_json(path / name), path / name)
    if (path / "vae" / "config.json").is_file():
        check_vae([], read_json(path / "vae" / "config.json"), path / "vae")

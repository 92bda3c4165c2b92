"""LoRA files that are wrong, damaged or for another model: one line that says what, and nothing half done."""

import json
import pickle

import numpy as np
import pytest
from safetensors.numpy import save_file

from fps_convert.lora.read import open_lora
from fps_convert.lora.write import write_lora
from fps_jax.checkpoints.lora import Scaled, merge
from fps_jax.config import WAN_I2V_14B, WAN_T2V_1_3B, WanConfig
from fps_jax.models.lora import LoRAConfig
from tests.checkpoints import TINY
from tests.lora_spellings import PEFT, blocks, metadata, spelled

CONFIG = WanConfig(dit=TINY)
GOOD = spelled(blocks(only=("self_attn.q",)), prefix="diffusion_model.", alpha=4, **PEFT)
Q = "diffusion_model.blocks.0.self_attn.q"
OURS = {"made_by": "fps_jax", "rank": "4", "alpha": "4.0"}


def zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


def pair(module: str, outs: int, ins: int, rank: int = 4) -> dict[str, np.ndarray]:
    return {f"{module}.lora_A.weight": zeros(rank, ins), f"{module}.lora_B.weight": zeros(outs, rank)}


def without(key: str) -> dict[str, np.ndarray]:
    return {name: value for name, value in GOOD.items() if name != key}


# tensors, metadata, config, message
WRONG = {
    "a 14B LoRA on a 1.3B model": (
        pair("diffusion_model.blocks.0.self_attn.q", 5120, 5120) | pair("diffusion_model.blocks.39.ffn.0", 13824, 5120),
        None, WAN_T2V_1_3B,
        r"blocks.0.self_attn.q.lora_A.weight' has shape \[4, 5120\], this model needs \[rank, 1536\] \(and 1 more\): "
        "it's a LoRA for Wan 14B, this model is 1.3B",
    ),
    "a 1.3B LoRA on a 14B model": (
        pair("lora_unet_blocks_3_cross_attn_o", 1536, 1536), None, WAN_I2V_14B, "it's a LoRA for Wan 1.3B, this model is 14B",
    ),
    "more layers than the model": (
        GOOD | pair("diffusion_model.blocks.7.self_attn.q", 64, 64), None, CONFIG,
        r"has 'diffusion_model.blocks.7.self_attn.q.lora_A.weight' and 1 more, which matches nothing in this model \(it names "
        r"block 7, this model has 3\); --lora-partial",
    ),
    "an I2V LoRA on a T2V model": (
        GOOD | pair("diffusion_model.blocks.0.cross_attn.k_img", 64, 64), None, CONFIG,
        "it's a LoRA for an image model, this is a t2v model",
    ),
    "a misspelt module": (
        GOOD | pair("diffusion_model.blocks.0.self_attn.qq", 64, 64), None, CONFIG,
        "the nearest module is 'blocks.0.self_attn.q'",
    ),
    "no Wan LoRA": (pair("unet.mid.attn", 8, 8), None, CONFIG, "has no LoRA for a Wan DiT: no key matches, such as 'unet.mid"),
    "a factor in another spelling": (
        GOOD | {f"{Q}.lora_A.scale_weight": np.float32(4)}, None, CONFIG,
        r"has '.*lora_A.scale_weight', which other tensors are to be multiplied by and which isn't read",
    ),
    "alpha in another spelling": (
        without(f"{Q}.alpha") | {f"{Q}.alpha.default": np.float32(4)}, None, CONFIG, "q.alpha.default', which other tensors",
    ),
    "half a pair": (without(f"{Q}.lora_B.weight"), None, CONFIG, r"but no lora_B \(lora_up\) for it"),
    "alpha alone": ({f"{Q}.alpha": np.float32(4)}, None, CONFIG, r"q.alpha' but no lora_A \(lora_down\) for it"),
    "ranks of the halves": (
        GOOD | {f"{Q}.lora_B.weight": zeros(64, 3)}, None, CONFIG,
        "lora_A.weight' has rank 4 and .*lora_B.weight' has rank 3; they belong together",
    ),
    "no rank at all": (
        GOOD | pair(Q, 64, 64, rank=0), None, CONFIG,
        r"lora_A.weight' has shape \[0, 64\], this model needs \[rank, 64\]$",
    ),
    "the metadata's rank": (
        GOOD, OURS | {"rank": "8"}, CONFIG, "its metadata says rank 8, .*lora_A.weight' has rank 4; they must agree",
    ),
    "the metadata's alpha": (
        GOOD, OURS | {"alpha": "8.0"}, CONFIG, "its metadata says alpha 8, .*alpha' is 4; they must agree",
    ),
    "diffusers' rank": (
        spelled(blocks(), prefix="transformer.", **PEFT), metadata(r=16), CONFIG,
        "lora_adapter_metadata says rank 16, .* has rank 4; they must agree",
    ),
    "diffusers' metadata": (
        GOOD, {"lora_adapter_metadata": "{"}, CONFIG, "lora_adapter_metadata is not valid JSON",
    ),
    "diffusers' metadata is a list": (
        GOOD, {"lora_adapter_metadata": "[]"}, CONFIG, "lora_adapter_metadata holds a JSON list, not an object",
    ),
    "diffusers' alpha": (
        GOOD, {"lora_adapter_metadata": '{"transformer.lora_alpha": "x"}'}, CONFIG, "lora_alpha='x' is not a positive number",
    ),
    "diffusers' pattern": (
        GOOD, {"lora_adapter_metadata": '{"transformer.rank_pattern": 3}'}, CONFIG, "rank_pattern=3 is not an object",
    ),
    "alpha zero": (GOOD | {f"{Q}.alpha": np.float32(0)}, None, CONFIG, "q.alpha' is 0; a LoRA's alpha is a positive number"),
    "alpha NaN": (GOOD | {f"{Q}.alpha": np.float32("nan")}, None, CONFIG, "q.alpha' is nan"),
    "alpha of two numbers": (
        GOOD | {f"{Q}.alpha": zeros(2)}, None, CONFIG, r"q.alpha' has shape \[2\], this model needs one number",
    ),
    "NaN": (
        GOOD | {f"{Q}.lora_A.weight": np.full((4, 64), np.nan, np.float32)}, None, CONFIG,
        "lora_A.weight' holds NaN or inf",
    ),
    "inf in a difference": (
        {f"{Q}.diff_b": np.full(64, np.inf, np.float32)}, None, CONFIG, "diff_b' holds NaN or inf",
    ),
    "a difference of another shape": (
        {f"{Q}.diff": zeros(64, 32)}, None, CONFIG, r"q.diff' has shape \[64, 32\], this model needs \[64, 64\]",
    ),
    "another number of channels": (
        {"diffusion_model.patch_embedding.lora_A.weight": zeros(4, 36, 1, 2, 2),
         "diffusion_model.patch_embedding.lora_B.weight": zeros(64, 4, 1, 1, 1)}, None, CONFIG,
        "it's a LoRA for another task",
    ),
    "a matrix for a vector": (
        pair("diffusion_model.blocks.0.norm3", 64, 64), None, CONFIG, "is a low-rank matrix for blocks/norm_cross/scale",
    ),
    "one tensor twice": (
        GOOD | pair("transformer.blocks.0.attn1.to_q", 64, 64), None, CONFIG, "names one tensor twice: .*; keep one of them",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_file_is_told_in_one_line(name, tmp_path):
    tensors, data, config, message = WRONG[name]
    save_file({key: np.asarray(value) for key, value in tensors.items()}, tmp_path / "bad.safetensors", data)
    with pytest.raises(ValueError, match=message) as told:
        open_lora(tmp_path / "bad.safetensors", config)
    assert "bad.safetensors" in str(told.value)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("name", ["more layers than the model", "an I2V LoRA on a T2V model", "a misspelt module"])
def test_partial_leaves_out_what_matches_nothing(name, tmp_path):
    save_file({key: np.asarray(value) for key, value in WRONG[name][0].items()}, tmp_path / "lora.safetensors")
    opened = open_lora(tmp_path / "lora.safetensors", CONFIG, partial=True)
    assert len(opened.report["left_out"]) == 2
    assert set(opened.changes) == {("blocks/self_attn/q/kernel", layer) for layer in range(3)}


@pytest.mark.parametrize(
    "name",
    [
        "a 1.3B LoRA on a 14B model",
        "no Wan LoRA",
        "half a pair",
        "NaN",
        "a factor in another spelling",
        "alpha in another spelling",
    ],
)  # fmt: skip
def test_partial_excuses_nothing_else(name, tmp_path):
    tensors, data, config, message = WRONG[name]
    save_file({key: np.asarray(value) for key, value in tensors.items()}, tmp_path / "bad.safetensors", data)
    with pytest.raises(ValueError, match=message):
        open_lora(tmp_path / "bad.safetensors", config, partial=True)


@pytest.mark.parametrize(
    ("suffix", "kind"),
    [("dora_scale", "DoRA"), ("lora_magnitude_vector.weight", "DoRA"), ("hada_w1_a", "LoHa"), ("lokr_w1", "LoKr")],
)
def test_other_kinds_of_adapters_are_named(suffix, kind, tmp_path):
    save_file(GOOD | {f"{Q}.{suffix}": zeros(64)}, tmp_path / "bad.safetensors")
    with pytest.raises(NotImplementedError, match=f"is {kind} .*isn't supported; a plain LoRA is"):
        open_lora(tmp_path / "bad.safetensors", CONFIG)


def test_dora_in_peft_s_config_is_named(tmp_path):
    save_file(GOOD, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"use_dora": True}))
    with pytest.raises(NotImplementedError, match=r"adapter_config\.json says use_dora"):
        open_lora(tmp_path, CONFIG)


def test_fp8_and_whole_numbers_are_refused(tmp_path):
    save_file(GOOD | {f"{Q}.lora_A.weight": np.zeros((4, 64), np.int8)}, tmp_path / "bad.safetensors")
    with pytest.raises(NotImplementedError, match="has dtype I8; weights are F32, F16 or BF16"):
        open_lora(tmp_path / "bad.safetensors", CONFIG)


class Ran:
    """Pickled, it makes whoever loads it write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("name", ["lora.pt", "lora.safetensors"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_is_refused_whatever_its_name_and_never_run(name, zipped, tmp_path):
    import zipfile

    content = pickle.dumps(Ran(tmp_path / "ran"), protocol=2)
    if zipped:
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr("archive/data.pkl", content)
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(
        ValueError, match=r"is a pickle, which can run code when it's loaded; use the LoRA's \.safetensors"
    ):
        open_lora(tmp_path / name, CONFIG)
    assert not (tmp_path / "ran").exists()
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_a_header_whose_length_looks_like_a_pickle_is_read(tmp_path):
    """A header of 0x0380 bytes begins as a pickle of protocol 3 does."""
    path = tmp_path / "lora.safetensors"
    for fill in range(1024):
        save_file({**GOOD}, path, {"note": "x" * fill})
        if path.read_bytes()[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
            break
    assert path.read_bytes()[:1] == b"\x80"
    assert len(open_lora(path, CONFIG).changes) == 3


def test_damaged_missing_and_ambiguous_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"doesn't exist; give a \.safetensors file"):
        open_lora(tmp_path / "lora.safetensors", CONFIG)
    save_file(GOOD, tmp_path / "a.safetensors")
    whole = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "b.safetensors").write_bytes(whole[:-8])
    with pytest.raises(ValueError, match=r"b\.safetensors is not a whole safetensors file: truncated"):
        open_lora(tmp_path / "b.safetensors", CONFIG)
    with pytest.raises(ValueError, match=r"has 2 \.safetensors files; give the LoRA's own file"):
        open_lora(tmp_path, CONFIG)
    (tmp_path / "c.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"c\.safetensors is empty"):
        open_lora(tmp_path / "c.safetensors", CONFIG)


def test_a_sum_that_overflows_names_parameter_file_and_dtype(tmp_path):
    large = GOOD | {f"{Q}.diff_b": np.full(64, 60000, np.float32)}
    save_file(large, tmp_path / "lora.safetensors")
    opened = open_lora(tmp_path / "lora.safetensors", CONFIG)
    place = ("blocks/self_attn/q/bias", 0)
    with pytest.raises(
        ValueError, match=r"q/bias of layer 0 has NaN or inf as float16 with .*lora\.safetensors merged"
    ):
        merge(np.zeros(64, np.float16), place, [Scaled(opened, 2.0)])
    assert merge(np.zeros(64, np.float16), place, [Scaled(opened)]).max() == 60000


LORA = LoRAConfig(rank=2, alpha=2, targets=("self_attn/q",))
ADAPTERS = {"lora_a": np.ones((3, 64, 2), np.float32), "lora_b": np.ones((3, 2, 64), np.float32)}


def tree(**halves: np.ndarray) -> dict:
    return {"blocks": {"self_attn": {"q": ADAPTERS | halves}}}


@pytest.mark.parametrize(
    ("name", "adapters", "options", "message"),
    [
        ("lora.bin", tree(), {}, "'.*lora.bin' doesn't end in .safetensors"),
        ("lora.safetensors", tree(), {"dtype": "float64"}, "dtype='float64' is none of"),
        ("lora.safetensors", {}, {}, "there are no adapters to write"),
        (
            "lora.safetensors",
            {"blocks": {"norm_cross": ADAPTERS}},
            {},
            "adapter 'blocks/norm_cross' is no lora_a and lora_b",
        ),
        (
            "lora.safetensors",
            tree(lora_a=np.ones((3, 64, 3), np.float32)),
            {},
            r"has shapes \[3, 64, 3\].*another model or LoRA",
        ),
        (
            "lora.safetensors",
            tree(lora_a=np.full((3, 64, 2), np.nan, np.float32)),
            {},
            "would hold NaN or inf as float32",
        ),
        (
            "lora.safetensors",
            tree(lora_b=np.full((3, 2, 64), 1e6, np.float32)),
            {"dtype": "float16"},
            "NaN or inf as float16",
        ),
    ],
)
def test_what_cannot_be_written_leaves_no_file(name, adapters, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        write_lora(tmp_path / name, CONFIG, adapters, LORA, **options)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(OSError, match=r"can't write '.*no/lora\.safetensors': No such file or directory"):
        write_lora(tmp_path / "no" / "lora.safetensors", CONFIG, tree(), LORA)

"""LoRA files in each spelling against what diffusers makes of them, and against each other. Goldens: tests/data/README.md."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fps_convert import mapping
from fps_convert.lora.keys import Spellings
from fps_convert.lora.read import open_lora
from fps_convert.lora.write import write_lora
from fps_jax.checkpoints.lora import Scaled, merge
from fps_jax.config import WAN_FLF2V_14B, WanConfig
from fps_jax.models.dit import dit
from fps_jax.models.lora import LoRAConfig, merge_lora, with_lora
from fps_jax.models.params import Params, flatten, unflatten
from tests import lora_spellings
from tests.checkpoints import TINY, TINY_FLF2V, tiny_dit
from tests.lora_spellings import CASES, KOHYA, PEFT, RANK, blocks, spelled
from tests.reference import golden, rel_l2

CONFIGS = {"t2v": WanConfig(dit=TINY), "flf2v": WanConfig(dit=TINY_FLF2V)}
GOLDEN = golden("lora")


@pytest.fixture
def saved(tmp_path):
    """`saved(tensors, metadata)`: the path of a file that holds them."""

    def save(tensors, metadata=None, name="lora.safetensors"):
        save_file({key: np.asarray(value) for key, value in tensors.items()}, tmp_path / name, metadata)
        return tmp_path / name

    return save


def merged(task: str, lora, scale: float = 1.0) -> Params:
    """The tiny model's parameters with a LoRA merged, float32."""
    leaves = {path: np.array(leaf) for path, leaf in flatten(tiny_dit(task))}
    for path, layer in lora.changes:
        at = ... if layer is None else layer
        leaves[path][at] = merge(leaves[path][at], (path, layer), [Scaled(lora, scale)])
    return unflatten(leaves)


def probes(task: str, params: Params) -> dict[str, np.ndarray]:
    """What make_golden_lora.py keeps of each parameter, under diffusers' names."""
    leaves, found = dict(flatten(params)), {}
    for row in mapping.rows("dit", CONFIGS[task]):
        leaf = leaves[row.path] if row.layer is None else leaves[row.path][row.layer]
        values = np.asarray(mapping.from_ours(leaf, row, "diffusers"), np.float64).reshape(row.shapes["diffusers"])
        vector = np.linspace(-1, 1, values[0].size)
        found[row.keys["diffusers"]] = values.reshape(len(values), -1) @ vector if values.ndim > 1 else values
    return found


@functools.cache
def base_probes(task: str) -> dict[str, np.ndarray]:
    return probes(task, tiny_dit(task))


MERGES = sorted({tuple(m.groups()) for key in GOLDEN if (m := re.match(r"(\w+)\.(1|0\.5)\.probe\.", key))})


@pytest.mark.parametrize(("case", "scale"), MERGES)
def test_merged_weights_are_those_that_diffusers_fuses(case, scale, saved):
    task = "flf2v" if case == "image" else "t2v"
    got = probes(task, merged(task, open_lora(saved(*CASES[case]), CONFIGS[task]), float(scale)))
    prefix = f"{case}.{scale}.probe."
    want = {key.removeprefix(prefix): value for key, value in GOLDEN.items() if key.startswith(prefix)}
    assert {name for name, value in got.items() if not np.array_equal(value, base_probes(task)[name])} == set(want)
    for name, value in want.items():
        assert rel_l2(got[name], value) <= 1e-6, name


def evaluate(task: str, params: Params) -> jax.Array:
    """On the inputs of the model's own golden file, as make_golden_lora.py."""
    params = jax.tree.map(jnp.asarray, params)
    if task == "t2v":
        g = golden("dit_t2v_single")
        x, t, text = jnp.asarray(g["in.x0"])[None], jnp.asarray(g["in.t"], jnp.float32), g["in.context0"][None]
        return jit_dit(TINY, params, x, t, jnp.asarray(text)).velocity
    g = {key: jnp.asarray(value.astype(np.float32)) for key, value in golden("flf2v_forward").items()}
    image = g["in.image_embeds"].reshape(-1, 514, 80)
    return jit_dit(TINY_FLF2V, params, g["in.latents"], g["in.timestep"], g["in.text_first24"], image).velocity


jit_dit = jax.jit(dit, static_argnums=0)


@pytest.mark.parametrize("case", ["ours", "down_up", "outside", "image"])
def test_a_merged_model_gives_what_diffusers_gives_with_the_adapters_beside_its_weights(case, saved):
    task = "flf2v" if case == "image" else "t2v"
    out = evaluate(task, merged(task, open_lora(saved(*CASES[case]), CONFIGS[task])))
    assert rel_l2(out, GOLDEN[f"{case}.velocity"]) <= 1e-5


def adapters_of(tensors) -> Params:
    """Our adapters with the numbers of a file under official names."""
    ours = {"ffn.0": "mlp/up", "ffn.2": "mlp/down"}
    leaves = {}
    for name, _, _, _ in lora_spellings.LINEAR:
        path = f"blocks/{ours.get(name, name.replace('.', '/'))}"
        for half, letter in (("lora_a", "A"), ("lora_b", "B")):
            keys = (f"diffusion_model.blocks.{i}.{name}.lora_{letter}.weight" for i in range(3))
            leaves[f"{path}/{half}"] = np.stack([tensors[key].T for key in keys])
    return unflatten(leaves)


LORA = LoRAConfig(rank=RANK, alpha=6)


def test_we_write_the_file_that_diffusers_was_given(tmp_path):
    """CASES["ours"] was loaded by diffusers' own converter (make_golden_lora.py): the same tensors, and its numbers are ours."""
    wanted = CASES["ours"][0]
    adapters = adapters_of(wanted)
    write_lora(tmp_path / "lora.safetensors", CONFIGS["t2v"], adapters, LORA)
    written = load_file(tmp_path / "lora.safetensors")
    assert written.keys() == wanted.keys()
    for key, value in written.items():
        assert (value.dtype, value.shape) == (np.float32, np.shape(wanted[key])), key
        np.testing.assert_array_equal(value, wanted[key])
    assert [p.name for p in tmp_path.iterdir()] == ["lora.safetensors"]
    base = jax.tree.map(jnp.asarray, tiny_dit())
    assert rel_l2(evaluate("t2v", with_lora(base, adapters, LORA)), GOLDEN["ours.velocity"]) <= 1e-5


def test_what_is_written_is_read_back_as_it_was(tmp_path):
    lora = LoRAConfig(rank=3, alpha=5.0, targets=("*",))
    rng, leaves = np.random.default_rng(2), {}
    from fps_jax.models.lora import target_layers

    for path, (*stack, d_in, d_out) in target_layers(TINY, lora).items():
        leaves |= {
            f"{path}/lora_a": rng.normal(size=(*stack, d_in, 3)),
            f"{path}/lora_b": rng.normal(size=(*stack, 3, d_out)),
        }
    adapters = unflatten({path: leaf.astype(np.float32) for path, leaf in leaves.items()})
    write_lora(tmp_path / "lora.safetensors", CONFIGS["t2v"], adapters, lora)
    opened = open_lora(tmp_path / "lora.safetensors", CONFIGS["t2v"])
    assert opened.report["left_out"] == []
    # diffusers' converter refuses a file that has an alpha outside the blocks (tried with 0.42.1).
    alphas = {key for key in load_file(tmp_path / "lora.safetensors") if key.endswith(".alpha")}
    assert len(alphas) == 3 * len(lora_spellings.LINEAR)
    assert all(key.startswith("diffusion_model.blocks.") for key in alphas)
    want = merge_lora(tiny_dit(), adapters, lora, scale=0.75)
    for (path, got), (_, leaf) in zip(flatten(merged("t2v", opened, 0.75)), flatten(want), strict=True):
        np.testing.assert_allclose(got, leaf, rtol=0, atol=4e-7 * np.abs(leaf).max(), err_msg=path)


def test_a_half_precision_file_holds_rounded_numbers_and_its_alpha(tmp_path):
    path = tmp_path / "lora.safetensors"
    write_lora(path, CONFIGS["t2v"], adapters_of(CASES["ours"][0]), LORA, dtype="bfloat16")
    opened = open_lora(path, CONFIGS["t2v"])
    assert opened.report["alpha_over_rank"] == [1.5]
    change = opened.changes["blocks/mlp/up/kernel", 2][0]
    assert change.a.dtype.name == "bfloat16"
    np.testing.assert_allclose(np.float32(change.a), lora_spellings.draw("blocks.2.ffn.0.A", RANK, 64).T, rtol=2**-8)


# Spellings that diffusers doesn't read, by the one that it does.
SAME = {
    "peft": (spelled(blocks(), prefix="base_model.model.", down="lora_A.default.weight", up="lora_B.default.weight"), "no_alpha"),
    "peft of diffusers": (
        spelled(blocks(), prefix="base_model.model.", module=lora_spellings.diffusers_name, **PEFT), "no_alpha",
    ),
    "without prefix": (spelled(blocks(), prefix="", down="lora_A.default.weight", up="lora_B.default.weight"), "no_alpha"),
    "whole model's prefix": (spelled(blocks(), prefix="model.diffusion_model.", alpha=6, **PEFT), "ours"),
    "lora.down": (
        spelled(blocks(), prefix="transformer.", module=lora_spellings.diffusers_name, down="lora.down.weight",
                up="lora.up.weight", alpha=6), "ours",
    ),
    "diffusers' names with underscores": (
        spelled(blocks(), prefix="lora_transformer_", alpha=1, **KOHYA,
                module=lambda name: lora_spellings.underscored(lora_spellings.diffusers_name(name))), "kohya",
    ),
    "whole alpha": (
        spelled(blocks(), prefix="diffusion_model.", **PEFT)
        | {f"diffusion_model.{name}.alpha": np.int64(6) for name, _, _ in blocks()}, "ours",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SAME)
def test_other_spellings_are_the_same_lora(name, saved):
    tensors, case = SAME[name]
    config = CONFIGS["t2v"]
    got, want = open_lora(saved(tensors, name="a.safetensors"), config), open_lora(saved(*CASES[case]), config)
    assert got.changes.keys() == want.changes.keys()
    for place, (change,) in got.changes.items():
        (other,) = want.changes[place]
        assert change.scale == other.scale
        np.testing.assert_array_equal(change.dense(), other.dense())


def test_alpha_of_peft_lies_in_a_file_beside(saved):
    tensors = spelled(blocks(), prefix="base_model.model.", **PEFT)
    path = saved(tensors, name="adapter_model.safetensors")
    beside = path.with_name("adapter_config.json")
    beside.write_text('{"r": 4, "lora_alpha": 6, "alpha_pattern": {"self_attn.v": 2}}')
    opened = open_lora(path.parent, CONFIGS["t2v"])  # the folder, as peft saves it
    assert opened.changes["blocks/self_attn/q/kernel", 0][0].scale == 1.5
    assert opened.changes["blocks/self_attn/v/kernel", 0][0].scale == 0.5
    assert "adapter_config.json" in opened.report["alpha_from"]
    beside.write_text('{"r": 4, "lora_alpha": 6, "use_rslora": true}')
    assert open_lora(path, CONFIGS["t2v"]).changes["blocks/self_attn/q/kernel", 0][0].scale == 3.0


DIFFERENCES = {
    "blocks.1.self_attn.norm_q.diff": ("blocks/self_attn/norm_q/scale", 1, (64,)),
    "blocks.1.norm3.diff": ("blocks/norm_cross/scale", 1, (64,)),
    "blocks.1.norm3.diff_b": ("blocks/norm_cross/bias", 1, (64,)),
    "blocks.2.diff_m": ("blocks/modulation", 2, (1, 6, 64)),
    "blocks.0.modulation.diff": ("blocks/modulation", 0, (1, 6, 64)),
    "head.diff_m": ("head/modulation", None, (1, 2, 64)),
    "head.head.diff": ("head/proj/kernel", None, (64, 64)),
    "patch_embedding.diff": ("patch_embedding/kernel", None, (64, 16, 1, 2, 2)),
    "patch_embedding.diff_b": ("patch_embedding/bias", None, (64,)),
}


def test_differences_are_added_to_norms_modulation_biases_and_matrices(saved):
    tensors = {
        f"diffusion_model.{name}": lora_spellings.draw(name, *shape) for name, (_, _, shape) in DIFFERENCES.items()
    }
    opened = open_lora(saved(tensors), CONFIGS["t2v"])
    assert set(opened.changes) == {(path, layer) for path, layer, _ in DIFFERENCES.values()}
    got = dict(flatten(merged("t2v", opened, 0.5)))
    for name, (path, layer, _) in DIFFERENCES.items():
        at = ... if layer is None else layer
        base, half = dict(flatten(tiny_dit()))[path][at], np.float32(0.5) * tensors[f"diffusion_model.{name}"]
        # Ours are transposed, and a patch embedding's [in, out] in the order of its axes.
        want = half.reshape(len(half), -1).T if path.endswith("kernel") else half.reshape(base.shape)
        np.testing.assert_array_equal(got[path][at], base + want)


def test_a_pair_of_the_patch_embedding_is_a_convolutions(saved):
    a, b = lora_spellings.draw("pa", 4, 16, 1, 2, 2), lora_spellings.draw("pb", 64, 4, 1, 1, 1)
    keys = {"diffusion_model.patch_embedding.lora_A.weight": a, "diffusion_model.patch_embedding.lora_B.weight": b}
    (change,) = open_lora(saved(keys), CONFIGS["t2v"]).changes["patch_embedding/kernel", None]
    want = np.einsum("or,ri->io", b.reshape(64, 4), a.reshape(4, 64))
    np.testing.assert_allclose(change.dense(), want, rtol=1e-5, atol=1e-6)


def test_the_bias_of_a_pair_is_scaled_as_the_pair(saved):
    tensors = spelled(blocks(only=("ffn.2",)), prefix="diffusion_model.", alpha=2, **PEFT)
    bias = lora_spellings.draw("bias", 64)
    opened = open_lora(saved(tensors | {"diffusion_model.blocks.1.ffn.2.lora_B.bias": bias}), CONFIGS["t2v"])
    np.testing.assert_array_equal(opened.changes["blocks/mlp/down/bias", 1][0].dense(), np.float32(0.5) * bias)


def test_several_are_added_in_float32_and_rounded_once(saved):
    config = CONFIGS["t2v"]
    one, two = (
        open_lora(saved(*CASES["ours"]), config),
        open_lora(saved(*CASES["partial"], name="b.safetensors"), config),
    )
    place = ("blocks/mlp/down/kernel", 1)
    base = tiny_dit()["blocks"]["mlp"]["down"]["kernel"][1].astype(jnp.bfloat16)
    got = merge(base, place, [Scaled(one, 0.5), Scaled(two, -1.0)])
    pairs = [lora_spellings.draw(f"blocks.1.ffn.2.{half}", *shape) for half, shape in (("A", (4, 128)), ("B", (64, 4)))]
    delta = (pairs[1].astype(np.float64) @ pairs[0]).T
    once = (base.astype(np.float64) + 0.5 * 1.5 * delta - delta).astype(jnp.bfloat16)
    twice = ((base.astype(np.float64) + 0.5 * 1.5 * delta).astype(jnp.bfloat16) - delta).astype(jnp.bfloat16)
    assert got.dtype == jnp.bfloat16
    # A float32 sum is off by up to 2**-24 of it, a bf16 rounds at every 2**-8: one in some ten thousand falls to the other side.
    assert (got != once).mean() < 1e-3
    assert (got != twice).mean() > 1e-2
    untouched = ("blocks/self_attn/norm_q/scale", 0)
    assert merge(base, untouched, [Scaled(one)]) is base


def test_a_report_says_what_was_used(saved):
    tensors = CASES["partial"][0] | {"vae.up.lora_A.weight": np.ones((2, 2), np.float32)}
    report = open_lora(saved(tensors), CONFIGS["t2v"], partial=True)
    assert report.report["used"] == 12
    assert report.report["left_out"] == ["vae.up.lora_A.weight"]
    assert report.report["changed"] == [
        "blocks/cross_attn/v/kernel",
        "blocks/mlp/down/kernel",
        "blocks/self_attn/q/kernel",
    ]
    assert report.summary == (
        "LoRA lora.safetensors: 12 of 13 tensors change 6 parameters (rank 4, alpha / rank 1: none given, taken as 1), "
        "1 tensors left out"
    )


@pytest.mark.parametrize("config", [WAN_FLF2V_14B, CONFIGS["t2v"]], ids=["flf2v", "t2v"])
def test_no_two_modules_are_one_with_underscores(config):
    spellings = Spellings(mapping.rows("dit", config))
    assert len(spellings.underscored) == len(spellings.names)

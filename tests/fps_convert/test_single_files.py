"""Single files as ComfyUI's and Kijai's: named one by one or lying anywhere, under any prefix, in either naming; and written."""

import dataclasses
import json
import pathlib
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fps_convert import layouts, open_checkpoint, to_flax, to_torch
from fps_convert.single_files import Given
from fps_convert.synthetic import tiny_config
from fps_convert.torch_configs import official_dit
from fps_jax.checkpoints.open import open_model, open_model_files
from fps_jax.models.tokenizer import Tokenizer
from tests.checkpoints import T2V
from tests.fps_convert.failing import fails
from tests.fps_convert.tensors import read_all
from tests.fps_convert.test_round_trips import BF16, same_arrays

DIT = "diffusion_pytorch_model.safetensors"
COMPONENTS = ("dit", "vae", "text_encoder", "image_encoder")


def tensors_of(official: pathlib.Path, diffusers: pathlib.Path) -> dict[tuple[str, str], dict[str, np.ndarray]]:
    """Every component's tensors in both namings, by other means than the converter's where there are any."""
    from fps_convert.formats.pth import PthFile

    found = {("dit", "official"): load_file(official / DIT)}
    for file in official.glob("*.pth"):
        reader = PthFile(file)
        name = "vae" if "VAE" in file.name else "text_encoder" if "t5" in file.name else "image_encoder"
        found[name, "official"] = {key: np.array(reader.read(key)) for key in reader.tensors}
    for name, folder in zip(COMPONENTS, ("transformer", "vae", "text_encoder", "image_encoder"), strict=True):
        if (diffusers / folder).is_dir():
            (file,) = (diffusers / folder).glob("*.safetensors")
            found[name, "diffusers"] = load_file(file)
    return found


@pytest.fixture(scope="module")
def tensors(pristine, tmp_path_factory):
    """One model a task."""
    found = {}
    for task in ("t2v", "flf2v"):
        official, folder = pristine("official", task, dtypes=BF16), tmp_path_factory.mktemp(task)
        to_flax(official, folder / "ours")
        to_torch(folder / "ours", folder / "diffusers", "diffusers")
        found[task] = tensors_of(official, folder / "diffusers")
    return found


@pytest.fixture
def comfy(tensors, tmp_path):
    """A ComfyUI folder: `comfy(task, prefix, namings)`; its tree and names are those of people's disks."""

    def write(task="t2v", prefix="", dit="official", others=("official", "diffusers", "diffusers"), tokenizer=True):
        root = tmp_path / "models"
        names = {
            "dit": "diffusion_models/wan/wan2.1_t2v_1.3B_bf16.safetensors",
            "vae": "vae/wan_2.1_vae.safetensors",
            "text_encoder": "text_encoders/umt5_xxl_fp16.safetensors",
            "image_encoder": "clip_vision/clip_vision_h.safetensors",
        }
        for name, naming in zip(COMPONENTS, (dit, *others), strict=True):
            if (name, naming) not in tensors[task]:
                continue
            content = dict(tensors[task][name, naming])
            if name == "dit":
                content = {prefix + key: value for key, value in content.items()}
            if name == "text_encoder" and tokenizer:
                content["spiece_model"] = np.frombuffer((T2V / "tokenizer" / "spiece.model").read_bytes(), np.uint8)
            (root / names[name]).parent.mkdir(parents=True)
            save_file(content, root / names[name])
        return root, {name: root / file for name, file in names.items() if (root / file).exists()}

    return write


@pytest.mark.parametrize(
    ("task", "prefix", "dit", "others"),
    [
        ("t2v", "", "official", ("official", "diffusers", "diffusers")),
        ("t2v", "model.diffusion_model.", "official", ("official", "official", "official")),
        ("flf2v", "diffusion_model.", "official", ("diffusers", "diffusers", "diffusers")),
        ("flf2v", "", "diffusers", ("official", "official", "official")),
    ],
)
def test_single_files_anywhere_are_a_checkpoint(comfy, pristine, tmp_path, task, prefix, dit, others):
    root, files = comfy(task, prefix, dit, others)
    want, source = open_checkpoint(pristine("official", task, dtypes=BF16)), open_checkpoint(root)
    assert (source.layout, source.components) == ("comfyui", want.components)
    assert source.config == want.config  # sizes, task and flow shift: of shapes alone
    for name in want.components:
        assert same_arrays(source.load(name), want.load(name))
    ids = Tokenizer.from_directory(source.tokenizer_dir)(["A cat, ½ of it"])[0]
    np.testing.assert_array_equal(ids, Tokenizer.from_directory(T2V / "tokenizer")(["A cat, ½ of it"])[0])
    named = open_model_files(**files)
    assert named.config == want.config
    to_flax(root, tmp_path / "ours")
    to_torch(tmp_path / "ours", tmp_path / "back", "official")
    assert read_all(tmp_path / "back") == read_all(pristine("official", task, dtypes=BF16))


def test_folders_that_are_links_are_read(comfy, tmp_path):
    root, _ = comfy()
    (tmp_path / "linked").mkdir()
    for folder in root.iterdir():
        (tmp_path / "linked" / folder.name).symlink_to(folder)
    (tmp_path / "linked" / "again").symlink_to(tmp_path / "linked")  # a circle
    assert open_checkpoint(tmp_path / "linked").config == open_checkpoint(root).config


def test_of_a_whole_comfyui_only_what_may_hold_models_is_counted(comfy, tmp_path, monkeypatch):
    """A clone with its history and its virtual environment has more files than a folder of models may have."""
    root, _ = comfy()
    want = open_checkpoint(root).config
    for folder in (tmp_path / ".git" / "objects", tmp_path / "venv" / "lib"):
        folder.mkdir(parents=True)
        for number in range(30):
            (folder / str(number)).touch()
    (tmp_path / "venv" / "pyvenv.cfg").touch()
    monkeypatch.setattr(layouts, "MAX_ENTRIES", 30)
    assert open_checkpoint(tmp_path).config == want
    (tmp_path / "venv" / "pyvenv.cfg").unlink()
    with pytest.raises(ValueError, match="has more than 30 files; give the folder that holds the models alone"):
        open_checkpoint(tmp_path)


def test_a_single_file_may_have_the_name_of_the_official_dit(comfy, tmp_path):
    root, files = comfy()
    want = open_checkpoint(root).config
    files["dit"].rename(root / "diffusion_pytorch_model.safetensors")
    source = open_checkpoint(root)
    assert (source.layout, source.config) == ("comfyui", want)


def test_a_file_in_place_of_a_part_leaves_what_the_directory_says(pristine, comfy, source):
    path = source("diffusers")
    for file, change in (
        ("scheduler/scheduler_config.json", {"flow_shift": 3.5}),
        ("model_index.json", {"_class_name": "WanDMDPipeline"}),
    ):
        (path / file).write_text(json.dumps(json.loads((path / file).read_text()) | change))
    _, files = comfy()
    config = open_checkpoint(path, Given(dit=files["dit"])).config
    assert (config.flow_shift, config.preset) == (3.5, "dmd")


def test_what_is_no_file_is_passed_by(comfy, source):
    root, _ = comfy()
    (root / "q.safetensors.index.json").mkdir()
    assert open_checkpoint(root).layout == "comfyui"
    path = source("official")
    (path / "x.pth").symlink_to(path / "nowhere")
    (path / "y.pth").mkdir()
    shutil.copy(path / "Wan2.1_VAE.pth", path / "A_VAE_old.pth")
    assert (
        "A_VAE_old.pth is a second vae and is left out: Wan2.1_VAE.pth is taken" in open_checkpoint(path).audit["notes"]
    )


def test_the_command_takes_files_one_by_one(comfy, tmp_path, capsys):
    import fps_convert.cli

    _, files = comfy(tokenizer=False)
    argv = ["to-flax", "--dit", files["dit"], "--vae", files["vae"], "--text-encoder", files["text_encoder"]]
    message = fails(capsys, *argv, tmp_path / "out")
    assert "holds no tokenizer (spiece_model)" in message
    assert "--tokenizer DIR" in message
    with pytest.raises(SystemExit) as stop:
        fps_convert.cli.main([*map(str, argv), "--tokenizer", str(T2V / "tokenizer"), str(tmp_path / "out")])
    assert stop.value.code == 0
    assert "t2v model, comfyui layout: dit, vae, text_encoder" in capsys.readouterr().out
    for file in (T2V / "tokenizer").iterdir():
        assert (tmp_path / "out" / "tokenizer" / file.name).read_bytes() == file.read_bytes()
    assert open_model(tmp_path / "out").config == tiny_config()
    assert "only one path was given, and no --vae, --text-encoder" in fails(capsys, *argv[:3], tmp_path / "other")
    assert "0 paths were given" in fails(capsys, *argv)


def test_two_files_for_one_part_are_both_named_with_the_option(comfy, tmp_path, capsys):
    root, files = comfy()
    second = root / "diffusion_models" / "another.safetensors"
    shutil.copy(files["dit"], second)
    message = fails(capsys, "to-flax", root, tmp_path / "out")
    for part in (str(files["dit"]), str(second), "--dit FILE", "dit= of WanPipeline.from_files"):
        assert part in message
    source = open_checkpoint(root, Given(dit=second))
    assert source.parts["dit"].reader.tensors["head.modulation"].file == second
    for number in (1, 2):
        shutil.copytree(T2V / "tokenizer", root / f"tokens{number}")
    assert open_checkpoint(root, Given(dit=second)).tokenizer_dir.parent != root  # that of the file
    stripped = load_file(files["text_encoder"])
    del stripped["spiece_model"]
    save_file(stripped, files["text_encoder"])
    with pytest.raises(ValueError, match=r"2 tokenizers: .*tokens1 and .*tokens2; choose with --tokenizer DIR"):
        open_checkpoint(root, Given(dit=second))


def test_other_files_beside_dont_block_and_are_noted(comfy):
    root, _ = comfy()
    (root / "loras").mkdir()
    save_file({"blocks.0.self_attn.q.lora_A.weight": np.zeros((4, 48), np.float32)}, root / "loras" / "a.safetensors")
    save_file({"first.weight": np.zeros(3, np.float32)}, root / "upscaler.safetensors")
    (root / "old.pth").write_bytes(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19." + b"\0" * 50)
    # A T5 of another model: relative positions in its first block alone.
    t5 = {f"encoder.block.{i}.layer.0.SelfAttention.q.weight": np.zeros((4, 4), np.float32) for i in (0, 1)}
    t5["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = np.zeros((32, 2), np.float32)
    save_file(t5, root / "text_encoders" / "t5xxl.safetensors")
    notes = "\n".join(open_checkpoint(root).audit["notes"])
    assert "loras/a.safetensors is a LoRA and is left out" in notes
    assert "upscaler.safetensors is no part of a Wan2.1 model" in notes
    assert "text_encoders/t5xxl.safetensors is no part" in notes
    assert "old.pth is left out: " in notes


def test_a_file_that_is_something_else_than_it_was_given_for(comfy, tmp_path):
    root, files = comfy()
    save_file({"a.lora_A.weight": np.zeros(3, np.float32)}, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match=r"--vae .* is dit, not a vae of Wan2\.1"):
        open_checkpoint(root, Given(vae=files["dit"]))
    with pytest.raises(ValueError, match=r"--dit .* is a LoRA, not a dit"):
        open_checkpoint(root, Given(dit=tmp_path / "lora.safetensors"))
    with pytest.raises(FileNotFoundError, match=r"--dit .*nowhere is no file"):
        open_checkpoint(root, Given(dit=tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"--tokenizer .* has neither tokenizer\.json nor spiece\.model"):
        open_checkpoint(root, Given(tokenizer=tmp_path))
    files["vae"].write_bytes(files["vae"].read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"wan_2\.1_vae\.safetensors is not a whole safetensors file: truncated"):
        open_checkpoint(root)
    files["vae"].unlink()
    with pytest.raises(
        FileNotFoundError, match=r"a vae is missing; add its \.safetensors file, or give it with --vae FILE"
    ):
        open_checkpoint(root)


def test_one_file_that_holds_everything(tensors, tmp_path, pristine):
    """As all-in-one checkpoints of ComfyUI: a prefix a part, and odd keys beside."""
    whole = {f"model.diffusion_model.{key}": value for key, value in tensors["t2v"]["dit", "official"].items()}
    whole |= {f"vae.{key}": value for key, value in tensors["t2v"]["vae", "official"].items()}
    umt5 = "text_encoders.umt5xxl."
    whole |= {f"{umt5}transformer.{k}": v for k, v in tensors["t2v"]["text_encoder", "diffusers"].items()}
    whole[f"{umt5}logit_scale"] = np.ones(1, np.float32)
    whole[f"{umt5}spiece_model"] = np.frombuffer((T2V / "tokenizer" / "spiece.model").read_bytes(), np.uint8)
    (tmp_path / "checkpoints").mkdir()
    save_file(whole, tmp_path / "checkpoints" / "all.safetensors")
    source, want = open_checkpoint(tmp_path), open_checkpoint(pristine("official", dtypes=BF16))
    assert source.config == want.config
    for name in want.components:
        assert same_arrays(source.load(name), want.load(name))


def test_clip_files_without_their_prefix(comfy, pristine):
    root, files = comfy("flf2v")
    bare = {key.removeprefix("vision_model."): value for key, value in load_file(files["image_encoder"]).items()}
    save_file(bare, files["image_encoder"])
    want = open_checkpoint(pristine("official", "flf2v", dtypes=BF16))
    assert same_arrays(open_checkpoint(root).load("image_encoder"), want.load("image_encoder"))


def test_shards_with_their_index_are_one_file(tmp_path, pristine):
    shutil.copytree(pristine("diffusers", shard_bytes=60_000), tmp_path / "parts")
    for name in ("model_index.json", "scheduler"):
        path = tmp_path / "parts" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (tmp_path / "parts" / "transformer").rename(tmp_path / "parts" / "dit")  # no checkpoint of its own any more
    source, want = open_checkpoint(tmp_path), open_checkpoint(pristine("diffusers"))
    assert source.config == want.config
    assert same_arrays(source.load("dit"), want.load("dit"))


@pytest.mark.parametrize("layout", ["official", "diffusers"])
def test_a_prefix_within_a_layouts_own_files(source, pristine, layout):
    path = source(layout)
    file = path / DIT if layout == "official" else path / "transformer" / DIT
    save_file({f"model.diffusion_model.{key}": value for key, value in load_file(file).items()}, file)
    opened = open_checkpoint(path)
    assert same_arrays(opened.load("dit"), open_checkpoint(pristine(layout)).load("dit"))
    assert "prefix 'model.diffusion_model.'" in opened.audit["components"]["dit"]["notes"][0]


def test_heads_that_shapes_dont_tell(comfy, tmp_path):
    """Wan's heads are 128 wide. What is narrower is told to be a guess; a width between says what to do."""
    root, files = comfy()
    assert "2 are taken" in open_checkpoint(root).audit["components"]["dit"]["notes"][0]
    (files["dit"].parent / "config.json").write_text(
        json.dumps(official_dit(dataclasses.replace(tiny_config().dit, num_heads=6), "float32"))
    )
    opened = open_checkpoint(root)
    assert (opened.config.dit.num_heads, opened.audit["components"]["dit"]["notes"]) == (6, [])
    tensors = {"patch_embedding.weight": np.zeros((256, 16, 1, 2, 2), np.float32), "head.head.bias": np.zeros(64)}
    tensors |= {"blocks.0.self_attn.q.weight": np.zeros((256, 256)), "blocks.0.ffn.0.weight": np.zeros((8, 256))}
    from fps_convert.formats.readers import SafetensorsFile
    from fps_convert.infer import stated_by_shapes

    file = tmp_path / "a.safetensors"
    save_file(tensors, file)
    assert stated_by_shapes("official", SafetensorsFile(file), file)[0]["num_heads"] == 2
    save_file(tensors | {"blocks.0.self_attn.q.weight": np.zeros((192, 192))}, file)
    with pytest.raises(NotImplementedError, match=r"192 wide, no multiple of Wan's heads of 128; put its config\.json"):
        stated_by_shapes("official", SafetensorsFile(file), file)


def test_comfyui_files_are_written_and_come_back_bit_for_bit(pristine, tmp_path):
    task = "flf2v"  # has all components
    to_flax(pristine("official", task, dtypes=BF16), tmp_path / "a")
    report = to_torch(tmp_path / "a", tmp_path / "comfy", "comfyui")
    assert report["notes"] == []
    names = {file.relative_to(tmp_path / "comfy").as_posix() for file in (tmp_path / "comfy").rglob("*.safetensors")}
    assert names == {
        "diffusion_models/wan2.1_dit.safetensors",
        "vae/wan_2.1_vae.safetensors",
        "text_encoders/umt5_xxl.safetensors",
        "clip_vision/clip_vision_h.safetensors",
    }
    written = load_file(tmp_path / "comfy" / "text_encoders" / "umt5_xxl.safetensors")
    assert written["spiece_model"].tobytes() == (T2V / "tokenizer" / "spiece.model").read_bytes()
    audit = to_flax(tmp_path / "comfy", tmp_path / "b")
    assert audit["components"]["dit"]["notes"] == []  # heads were noted, not guessed
    to_torch(tmp_path / "b", tmp_path / "official", "official")
    assert read_all(tmp_path / "official") == read_all(pristine("official", task, dtypes=BF16))
    to_torch(tmp_path / "b", tmp_path / "again", "comfyui")
    assert read_all(tmp_path / "again") == read_all(tmp_path / "comfy")


def test_what_comfyui_looks_for_is_written_whatever_the_source_calls_it(pristine, tmp_path):
    """transformers 5 leaves out `vision_model.`, and a file may have the tied embedding under its other name."""
    shutil.copytree(pristine("diffusers", "flf2v"), tmp_path / "source")
    for file, new in (
        ("text_encoder", lambda key: "encoder.embed_tokens.weight" if key == "shared.weight" else key),
        ("image_encoder", lambda key: key.removeprefix("vision_model.")),
    ):
        path = tmp_path / "source" / file / "model.safetensors"
        save_file({new(key): value for key, value in load_file(path).items()}, path)
    to_flax(tmp_path / "source", tmp_path / "ours")
    to_torch(tmp_path / "ours", tmp_path / "comfy", "comfyui")
    to_torch(tmp_path / "ours", tmp_path / "back", "diffusers")
    assert read_all(tmp_path / "back") == read_all(tmp_path / "source")
    written = load_file(tmp_path / "comfy" / "text_encoders" / "umt5_xxl.safetensors")
    assert "shared.weight" in written
    assert "encoder.embed_tokens.weight" not in written
    clip = load_file(tmp_path / "comfy" / "clip_vision" / "clip_vision_h.safetensors")
    assert all(key.startswith("vision_model.") for key in clip)


def test_torch_s_files_are_told_by_what_they_hold(pristine, comfy, tmp_path):
    _, files = comfy()
    vae = pristine("official", dtypes=BF16) / "Wan2.1_VAE.pth"
    want = open_checkpoint(None, Given(**files)).load("vae")
    for name in ("model.pt", "pytorch_model.bin", "vae.ckpt"):
        shutil.copy(vae, tmp_path / name)
        assert same_arrays(open_checkpoint(None, Given(**files | {"vae": tmp_path / name})).load("vae"), want)
    (tmp_path / "old.pt").write_bytes(b"\x80\x02cposix\nsystem\n")
    with pytest.raises(ValueError, match=r"old\.pt"):
        open_checkpoint(None, Given(**files | {"vae": tmp_path / "old.pt"}))


def test_another_model_s_tokenizer_is_told(comfy, tmp_path):
    root, _ = comfy(tokenizer=False)
    (root / "tokenizer").mkdir()
    content = json.loads((T2V / "tokenizer" / "tokenizer.json").read_text())
    content["model"]["vocab"] += [[f"word{i}", 0.0] for i in range(1000)]
    (root / "tokenizer" / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(
        ValueError, match=r"another model's tokenizer: 1400 words, and .* has 416 rows; give the folder of UMT5's"
    ):
        open_checkpoint(root)


def test_a_tokenizer_that_comfyui_cannot_read_is_noted(pristine, tmp_path):
    to_flax(pristine("official"), tmp_path / "a")
    (tmp_path / "a" / "tokenizer" / "spiece.model").unlink()
    assert "no spiece.model" in to_torch(tmp_path / "a", tmp_path / "comfy", "comfyui")["notes"][0]
    assert open_checkpoint(tmp_path / "comfy").tokenizer_dir == tmp_path / "comfy" / "tokenizer"


@pytest.mark.parametrize("layout", ["official", "diffusers"])
def test_a_checkpoint_within_the_folder_is_not_taken_apart(pristine, comfy, layout):
    """Its JSON files say what shapes don't: flow shift, heads."""
    root, files = comfy()
    shutil.copytree(pristine(layout), root / "other")
    source = open_checkpoint(root)
    assert source.parts["dit"].reader.tensors["head.modulation"].file == files["dit"]
    assert "other is a checkpoint of its own and is left out" in source.audit["notes"]
    files["dit"].unlink()
    with pytest.raises(ValueError, match=r"has no dit of its own; give the checkpoint in it: .*other$"):
        open_checkpoint(root)

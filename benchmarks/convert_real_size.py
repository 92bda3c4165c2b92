"""Converts a synthetic checkpoint of real size there and back: seconds, GB/s beside a plain file copy, peak memory.

The keys, shapes and file names are those of Wan2.1-T2V-1.3B with a bf16 DiT and a float32 VAE, and a text encoder of two
layers; with --t5 those of UMT5-xxl in bf16 (11.4 GB; needs 50 GB of disk) beside a DiT of one layer. Each conversion is a
process of its own, whose RssAnon is sampled. The copy (shutil.copyfile of the same source files) runs before and after each
conversion. Works in TMPDIR; nothing big is left behind.

    python benchmarks/convert_real_size.py [--t5] [--layout official|diffusers|comfyui]

comfyui: single files whose DiT and text encoder are in FP8 with scales, as ComfyUI has them.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from benchmarks import record
from fps_convert import to_flax, to_torch
from fps_convert.formats.pth import PthFile
from fps_convert.formats.readers import open_safetensors
from fps_convert.synthetic import write_checkpoint
from fps_jax.config import WAN_T2V_1_3B

MEASURED = """
import json, sys, threading, time
from fps_jax.errors import run_cli
import fps_convert.cli
peak, done = 0, threading.Event()
def sample():
    global peak
    while not done.wait(0.01):
        with open("/proc/self/status") as status:
            peak = max(peak, next(int(line.split()[1]) for line in status if line.startswith("RssAnon")))
threading.Thread(target=sample, daemon=True).start()
began = time.perf_counter()
status = run_cli(fps_convert.cli._run, sys.argv[1:])
print(json.dumps({"status": status, "seconds": time.perf_counter() - began, "cpu_seconds": time.process_time(),
                  "peak_rss_anon_gib": peak / 2**20}))
"""


def files(directory: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def plain_copy(source: pathlib.Path, directory: pathlib.Path) -> tuple[float, float]:
    """GB/s and CPU seconds of shutil.copyfile of every file, without fsync (the conversion doesn't sync either)."""
    target = directory / "copy"
    target.mkdir()
    began, cpu = time.perf_counter(), time.process_time()
    size = 0
    for i, path in enumerate(files(source)):
        shutil.copyfile(path, target / str(i))
        size += path.stat().st_size
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    shutil.rmtree(target)
    return size / 1e9 / seconds, cpu


def convert(arguments: list[str], source: pathlib.Path, directory: pathlib.Path, largest: int) -> dict[str, Any]:
    before = plain_copy(source, directory)
    output = subprocess.run([sys.executable, "-c", MEASURED, *arguments], check=True, stdout=subprocess.PIPE, text=True)
    result = json.loads(output.stdout.splitlines()[-1])
    if result.pop("status"):
        raise SystemExit(output.stdout)
    after = plain_copy(source, directory)
    size = sum(path.stat().st_size for path in files(source)) / 1e9
    speed = size / result["seconds"]
    result |= {
        "gb": size,
        "gb_per_second": speed,
        "plain_copy_gb_per_second": [before[0], after[0]],
        "plain_copy_cpu_seconds": [before[1], after[1]],
        "of_plain_copy": speed / ((before[0] + after[0]) / 2),
        "largest_component_gib": largest / 2**30,
    }
    print(json.dumps(result), flush=True)
    return result


def tensors(directory: pathlib.Path) -> dict[str, bytes | Any]:
    """Readers of every weight file, to compare bit by bit."""
    readers = {}
    for path in files(directory):
        if path.suffix == ".pth":
            readers[path.name] = PthFile(path)
        elif path.name.endswith(".safetensors"):
            readers[str(path.parent.relative_to(directory))] = open_safetensors(
                path.parent, path.name.removesuffix(".safetensors").split("-0")[0]
            )
    return readers


def identical(first: pathlib.Path, second: pathlib.Path) -> bool:
    one, other = tensors(first), tensors(second)
    return one.keys() == other.keys() and all(
        one[name].tensors.keys() == other[name].tensors.keys()
        and all(one[name].read(key).tobytes() == other[name].read(key).tobytes() for key in one[name].tensors)
        for name in one
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--t5", action="store_true", help="all of UMT5-xxl")
    parser.add_argument("--layout", choices=("official", "diffusers", "comfyui"), default="official")
    options = parser.parse_args()
    config, model = WAN_T2V_1_3B, "Wan2.1-T2V-1.3B: bf16 DiT, float32 VAE, UMT5 of 2 layers"
    if options.t5:
        config = dataclasses.replace(config, dit=dataclasses.replace(config.dit, num_layers=1))
        model = "UMT5-xxl in bf16, float32 VAE, DiT of 1 layer"
    else:
        text = dataclasses.replace(config.text_encoder, num_layers=2, vocab_size=4096)
        config = dataclasses.replace(config, text_encoder=text)
    root = pathlib.Path(tempfile.mkdtemp(prefix="convert_real_size_"))
    try:
        source, ours, back = root / "source", root / "ours", root / "back"
        dtypes, cast = {"dit": "BF16", "text_encoder": "BF16"}, []
        if options.layout == "comfyui":
            cast = ["--dtype", "fp8_scaled"]
            write_checkpoint(root / "bf16", config, layout="official", dtypes=dtypes)
            to_flax(root / "bf16", root / "ours_bf16")
            to_torch(root / "ours_bf16", source, "comfyui", dtype="fp8_scaled")
            shutil.rmtree(root / "bf16")
            shutil.rmtree(root / "ours_bf16")
        else:
            write_checkpoint(source, config, layout=options.layout, dtypes=dtypes)
        os.sync()
        weights = [path.stat().st_size for path in files(source) if path.suffix in (".pth", ".safetensors")]
        if options.layout != "official":
            weights = [
                sum(p.stat().st_size for p in folder.iterdir()) for folder in source.iterdir() if folder.is_dir()
            ]
        there = convert(["to-flax", str(source), str(ours)], source, root, max(weights))
        os.sync()
        again = convert(["to-torch", str(ours), str(back), "--layout", options.layout, *cast], ours, root, max(weights))
        payload = {
            "model": model,
            "load_average": os.getloadavg(),
            "layout": options.layout,
            "to_flax": there,
            "to_torch": again,
            "bit_identical_there_and_back": identical(source, back),
        }
    finally:
        shutil.rmtree(root, ignore_errors=True)
    record.write(f"convert_{options.layout}_{'t5' if options.t5 else '1.3b'}", payload)


if __name__ == "__main__":
    main()

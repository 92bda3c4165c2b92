"""One forward pass of the whole T2V-1.3B DiT on a CPU, from a synthetic checkpoint with the real keys and shapes.

    python benchmarks/dit_real_size.py

Writes the checkpoint (bf16 DiT, official layout), converts it, loads it with `WanPipeline.from_pretrained`, runs the DiT at full
width and depth on 3 x 8 x 8 tokens and 512 text tokens. Needs 6 GB of memory and 7 GB of disk in TMPDIR, which are given back.
"""

import dataclasses
import functools
import pathlib
import resource
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from benchmarks.record import write


def main() -> None:
    import jax
    import jax.numpy as jnp

    from fps_convert import to_flax
    from fps_convert.small import SMALL, write_tokenizer
    from fps_convert.synthetic import write_checkpoint
    from fps_jax import WanPipeline
    from fps_jax.config import WAN_T2V_1_3B
    from fps_jax.models.dit import dit

    # The DiT alone is of real size: the text encoder is a small one but for its width, which the DiT has to agree with.
    text_encoder = dataclasses.replace(SMALL.text_encoder, dim=4096)
    config = dataclasses.replace(WAN_T2V_1_3B, text_encoder=text_encoder)
    seconds = {}
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        write_tokenizer(folder / "tokenizer")
        dtypes = {"dit": "BF16", "text_encoder": "BF16"}
        write_checkpoint(folder / "torch", config, layout="official", tokenizer_dir=folder / "tokenizer", dtypes=dtypes)
        start = time.perf_counter()
        to_flax(folder / "torch", folder / "ours")
        seconds["convert"] = time.perf_counter() - start
        start = time.perf_counter()
        pipe = WanPipeline.from_pretrained(folder / "ours", dtype="bfloat16")
        seconds["load"] = time.perf_counter() - start
    count = sum(leaf.size for leaf in jax.tree.leaves(pipe.params["dit"]))
    model = jax.jit(functools.partial(dit, config.dit, dtype=jnp.bfloat16))
    latents = jax.random.normal(jax.random.key(0), (1, 16, 3, 16, 16))
    text = jax.random.normal(jax.random.key(1), (1, 512, 4096), jnp.bfloat16)
    for run in ("first forward, with compile", "forward"):
        start = time.perf_counter()
        out = jax.block_until_ready(model(pipe.params["dit"], latents, jnp.array([500.0]), text))
        seconds[run] = time.perf_counter() - start
    if int(out.first_bad) >= 0:
        raise FloatingPointError("NaN or inf in the forward pass")
    write(
        "dit_real_size",
        {
            "claim": "T2V-1.3B at full width and depth converts, loads and runs",
            "parameters": count,
            "tokens": 3 * 8 * 8,
            "seconds": {name: round(value, 2) for name, value in seconds.items()},
            "velocity_std": round(float(out.velocity.std()), 4),
            "peak_rss_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2),
        },
    )


if __name__ == "__main__":
    main()

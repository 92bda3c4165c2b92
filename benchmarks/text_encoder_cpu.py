"""Speed of the text encoder on a CPU, beside transformers' UMT5EncoderModel in the same run.

    python benchmarks/text_encoder_cpu.py --torch-python /path/to/python3.11   # with torch, transformers

UMT5-xxl's width (4096, 10240, 64 heads), 4 layers, vocabulary 4096, one text of 512 tokens, float32, 2 threads. The two take turns
in processes of their own, on the same weights and ids; the median time of each counts. Compile time is apart. Needs 8 GB.
"""

import os
import pathlib
import sys

import numpy as np
from side_by_side import THREADS, compare, measure

VOCAB, DIM, MLP, HEADS, LAYERS, TOKENS = 4096, 4096, 10240, 64, 4, 512
ROOT = pathlib.Path(__file__).resolve().parent.parent


def _weights():
    """(name, layer or None, array [in, out]) in one order on both sides; of the sizes that T5 is initialised with."""
    rng = np.random.default_rng(0)

    def draw(*shape, std):
        return (rng.random(shape, np.float32) - np.float32(0.5)) * np.float32(std * 12**0.5)

    yield "embedding", None, draw(VOCAB, DIM, std=1)
    for layer in range(LAYERS):
        yield "q", layer, draw(DIM, DIM, std=1 / DIM)
        for name in ("k", "v", "o"):
            yield name, layer, draw(DIM, DIM, std=DIM**-0.5)
        yield "gate", layer, draw(DIM, MLP, std=DIM**-0.5)
        yield "up", layer, draw(DIM, MLP, std=DIM**-0.5)
        yield "down", layer, draw(MLP, DIM, std=MLP**-0.5)
        yield "bias", layer, draw(32, HEADS, std=0.5)


def _ids():
    return np.random.default_rng(1).integers(3, VOCAB, (1, TOKENS)).astype(np.int32)


def _ours(runs):
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.path.insert(0, str(ROOT))
    import jax.numpy as jnp

    from fps_jax.config import TextEncoderConfig
    from fps_jax.models.params import unflatten
    from fps_jax.models.text_encoder import encode_text

    config = TextEncoderConfig(vocab_size=VOCAB, dim=DIM, mlp_dim=MLP, num_heads=HEADS, num_layers=LAYERS)
    paths = {"bias": "rel_bias/embedding", "gate": "mlp/gate/kernel", "up": "mlp/up/kernel", "down": "mlp/down/kernel"}
    leaves = {f"blocks/norm{i}/scale": np.ones((LAYERS, DIM), np.float32) for i in (1, 2)}
    leaves["norm/scale"] = np.ones(DIM, np.float32)
    for name, layer, array in _weights():
        if layer is None:
            leaves["token_embedding/embedding"] = array
            continue
        path = f"blocks/{paths.get(name, f'attn/{name}/kernel')}"
        leaves.setdefault(path, np.empty((LAYERS, *array.shape), np.float32))[layer] = array
    params = unflatten({path: jnp.asarray(leaves.pop(path)) for path in list(leaves)})
    ids = _ids()
    return measure(lambda: np.asarray(encode_text(config, params, ids, np.ones_like(ids))), runs)


def _torch(runs):
    import torch
    from transformers import UMT5Config, UMT5EncoderModel

    torch.set_num_threads(THREADS)
    config = UMT5Config(
        vocab_size=VOCAB,
        d_model=DIM,
        d_kv=DIM // HEADS,
        d_ff=MLP,
        num_layers=LAYERS,
        num_heads=HEADS,
        feed_forward_proj="gated-gelu",
    )
    with torch.device("meta"):
        model = UMT5EncoderModel(config)
    model = model.to_empty(device="cpu").eval()
    names = {"gate": "layer.1.DenseReluDense.wi_0", "up": "layer.1.DenseReluDense.wi_1"}
    names |= {"down": "layer.1.DenseReluDense.wo", "bias": "layer.0.SelfAttention.relative_attention_bias"}
    with torch.inference_mode():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(1)
        for name, layer, array in _weights():
            if layer is None:
                for table in (model.shared, model.encoder.embed_tokens):  # no longer one, once off the meta device
                    table.weight.copy_(torch.from_numpy(array))
                continue
            key = f"encoder.block.{layer}.{names.get(name, f'layer.0.SelfAttention.{name}')}.weight"
            model.get_parameter(key).copy_(torch.from_numpy(array if name == "bias" else array.T))
        ids = torch.from_numpy(_ids()).long()
        mask = torch.ones_like(ids)
        return measure(lambda: model(input_ids=ids, attention_mask=mask).last_hidden_state.numpy(), runs)


if __name__ == "__main__":
    compare(
        __file__,
        claim="the text encoder on a CPU is at least as fast as transformers' in torch",
        case=f"UMT5 {DIM}/{MLP}/{HEADS} heads, {LAYERS} layers, {TOKENS} tokens",
        ours=_ours,
        torch=_torch,
        packages=("torch", "transformers"),
    )

"""Flax NNX as a notation for pytrees: modules on one side, nested dicts of arrays on the other.

A model file writes `nnx.Module` classes. Everything else sees `params`, a nested dict of arrays with string keys, and calls
`bind(build, params)(...)`, a pure function of params under any plain JAX transform. `build` is a hashable callable
from `nnx.Rngs` to a module: `functools.partial(DiT, config)` with a frozen config.
"""

import fnmatch
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

Params = dict[str, Any]  # nested; leaves are arrays (jax, NumPy or ShapeDtypeStruct)
Build = Callable[[nnx.Rngs], nnx.Module]
_ADAPTERS = ("/lora_a", "/lora_b")


@functools.cache
def _split(build: Build, adapters: tuple[str, ...] = ()) -> tuple[Any, Any]:
    """The structure of a model and its abstract parameters; `adapters`: paths of those that no module is built with."""

    def build_all() -> nnx.Module:
        module = build(nnx.Rngs(0))
        for path in adapters:
            *parents, name = path.split("/")
            owner = functools.reduce(lambda node, parent: getattr(node, parent, None), parents, module)
            if not hasattr(type(owner), name):  # stock layers would take the attribute, and not use it
                raise ValueError(
                    f"there is an adapter at {path!r}, where this model has no linear layer that takes one"
                )
            setattr(owner, name, nnx.Param(jnp.zeros(())))  # a place: `bind` replaces it
        return module

    return nnx.split(nnx.eval_shape(build_all), nnx.Param)


def abstract_params(build: Build) -> Params:
    """Shapes and dtypes of a model's parameters, nothing computed."""
    return nnx.to_pure_dict(_split(build)[1])


def init_params(build: Build, key: jax.Array) -> Params:
    """Random parameters. Pure: call it under `jax.jit` with `out_shardings` to create a large model in place."""
    return nnx.to_pure_dict(nnx.state(build(nnx.Rngs(key)), nnx.Param))


def bind(build: Build, params: Params) -> Any:
    """The module with these parameters in place, adapters (`lora_a`, `lora_b` beside a kernel) among them.

    Raises: ValueError for an adapter where the model has no place for one.
    """
    adapters = tuple(path for path, _ in flatten(params) if path.endswith(_ADAPTERS))
    graphdef, abstract = _split(build, adapters)
    state = jax.tree.map(lambda leaf: leaf, abstract)
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graphdef, state)


def stacked(build_block: Build, num_layers: int, rngs: nnx.Rngs) -> nnx.Module:
    """A block whose every parameter has a leading layer axis, for `scan_blocks`."""
    graphdef, _ = _split(build_block)
    keys = jax.random.split(rngs.params(), num_layers)  # split keys: without them vmap makes identical layers, silently
    return nnx.merge(graphdef, jax.vmap(lambda key: nnx.split(build_block(nnx.Rngs(key)), nnx.Param)[1])(keys))


def unstack(blocks: nnx.Module) -> tuple[Callable[[Any], Any], Any]:
    """`(block_of, layers)`: scan over `layers`, and `block_of(layer)` is the block of that layer."""
    graphdef, layers = nnx.split(blocks)
    return lambda layer: nnx.merge(graphdef, layer), layers


def flatten(params: Params, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves with their paths, 'blocks/self_attn/q/kernel' style, in sorted order."""
    for key in sorted(params):
        path = f"{prefix}/{key}" if prefix else key
        if isinstance(params[key], dict):
            yield from flatten(params[key], path)
        else:
            yield path, params[key]


def matches(path: str, pattern: str) -> bool:
    """Whether a pattern (as of file names: * ? [abc]; * crosses '/') is of a whole path, or of its end behind a '/'."""
    return fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase(path, f"*/{pattern}")


def unflatten(leaves: dict[str, Any]) -> Params:
    """Inverse of `flatten`."""
    params: Params = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return params

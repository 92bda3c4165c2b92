"""Taps: how a model shows what it computes inside, for tests and measurements, without paying for it otherwise.

A caller that wants intermediates passes an empty dict; modules write into it what passes by, under dotted names
(`self_attn.norm_q`), and the caller reads it once the call is over. None, the default, asks for nothing, and the program is the
one without taps. Under `jit` the dict is made inside the traced function and returned by it: a tap is an output like any other.
Where layers are scanned, each layer fills a dict of its own, and the scan stacks them: `blocks.*` with a leading layer axis.
"""

from jaxtyping import Array

Taps = dict[str, Array]


def tap(taps: Taps | None, name: str, x: Array) -> Array:
    """Record x under `name` where intermediates are asked for; x either way."""
    if taps is not None:
        taps[name] = x
    return x

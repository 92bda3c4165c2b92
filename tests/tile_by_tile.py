"""'portable' as it takes long heads, whatever their length: a test's few tokens would all be taken whole."""

import contextlib
from collections.abc import Iterator
from unittest import mock

from pallas_kernels import block_sparse
from pallas_kernels.portable import head


@contextlib.contextmanager
def portable_takes(heads: str) -> Iterator[None]:
    """`heads`: 'whole' (as it is for few tokens) or 'tile by tile'. Programs of the other way are forgotten on both sides."""
    if heads == "whole":
        yield
        return
    block_sparse._attention.clear_cache()
    with mock.patch.object(head, "_WHOLE_HEAD_PAIRS", 0):
        yield
    block_sparse._attention.clear_cache()

"""A component's tensors against the table: every row has its tensor, every tensor its row, in shape and dtype."""

import difflib
import pathlib

from fps_convert import mapping
from fps_convert.formats.readers import Reader
from fps_convert.mapping import UNUSED, Naming
from fps_convert.source import Part
from fps_jax.config import Component, WanConfig


def check(component: Component, naming: Naming, reader: Reader, config: WanConfig, where: pathlib.Path) -> Part:
    """Raises ValueError for the first tensor that is missing, extra or of another shape, and names it and its file."""
    table = mapping.rows(component, config)
    part = Part(reader, table, list(mapping.tensors(table, naming)))
    wanted = {tensor.key: tensor for tensor in part.tensors}
    part.unused = sorted(key for key in reader.tensors if key not in wanted and key.startswith(UNUSED[component]))
    extra = [key for key in reader.tensors if key not in wanted and key not in set(part.unused)]
    missing = [key for key in wanted if key not in reader.tensors]
    files = {info.file for info in reader.tensors.values()}
    where = files.pop() if len(files) == 1 else where
    if missing:
        near = difflib.get_close_matches(missing[0], extra, 1)
        more = f" and {len(missing) - 1} more" if missing[1:] else ""
        hint = f"; it has {near[0]!r}, which no Wan2.1 {component} has" if near else ""
        raise ValueError(f"{where} lacks tensor {missing[0]!r}{more}{hint}; copy or download it again")
    if extra:
        info = reader.tensors[extra[0]]
        near = difflib.get_close_matches(extra[0], wanted, 1)
        more = f" and {len(extra) - 1} more" if extra[1:] else ""
        hint = f" (the nearest known name is {near[0]!r})" if near else ""
        raise ValueError(
            f"{info.file} has tensor {extra[0]!r}{more}, which this {component} doesn't use{hint}; it is another model than "
            "Wan2.1, or holds more than its weights"
        )
    for tensor in part.tensors:
        info = reader.tensors[tensor.key]
        if info.shape != tensor.shape:
            raise ValueError(
                f"{info.file}: tensor {tensor.key!r} has shape {list(info.shape)}, this model needs "
                f"{list(tensor.shape)}"
            )
        info.check_dtype()
    filled = {(row.path, row.layer) for tensor in part.tensors for row in tensor.rows}
    unfilled = [row for row in table if (row.path, row.layer) not in filled]
    if unfilled:
        raise ValueError(f"{where}: no tensor fills {unfilled[0].path} of layer {unfilled[0].layer}")
    return part

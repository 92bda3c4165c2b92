"""The axes of a device mesh, and how a person writes their sizes. Imports no jax."""

# data: samples. fsdp: samples, and shards of parameters. context: tokens of a sample. tensor: heads and MLP columns.
AXES = ("data", "fsdp", "context", "tensor")
BATCH = ("data", "fsdp")


def parse_mesh(text: str) -> dict[str, int]:
    """Sizes of axes from 'data=2,fsdp=4'; those that aren't named have size 1.

    Raises: ValueError for an axis that there isn't, that comes twice, or whose size is no positive whole number.
    """
    sizes: dict[str, int] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, size = (piece.strip() for piece in part.partition("="))
        if name not in AXES:
            raise ValueError(f"mesh={text!r}: {name!r} is no axis; there are {', '.join(AXES)}, as in data=2,fsdp=4")
        if name in sizes:
            raise ValueError(f"mesh={text!r} gives {name} twice; give it once")
        if not size.isascii() or not size.isdigit() or int(size) < 1:
            raise ValueError(f"mesh={text!r}: {name}={size!r} is not a whole number of 1 or more")
        sizes[name] = int(size)
    return sizes

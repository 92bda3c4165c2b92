"""`.pth` files for tests, as torch writes them and as it never would, without torch."""

import io
import pickle
import zipfile

import numpy as np

from tests.reference import DATA

GOLDEN = DATA / "convert" / "models_t5_umt5-xxl-enc-bf16.pth"


class Fake:
    """Stands for a global of torch in a pickle, without torch."""

    def __init__(self, module, name):
        self.module, self.name = module, name


class Call:
    def __init__(self, function, args, state=None):
        self.function, self.args, self.state = function, args, state


class Pickler(pickle._Pickler):  # type: ignore[attr-defined]
    """Pickles `Fake` as a global, `Call` as a call and `_Storage` as a persistent id."""

    def save(self, obj, save_persistent_id=True):
        if isinstance(obj, Fake):
            self.write(b"c" + obj.module.encode() + b"\n" + obj.name.encode() + b"\n")
        elif isinstance(obj, Call):
            self.save(obj.function)
            self.save(obj.args)
            self.write(b"R")
            if obj.state is not None:
                self.save(obj.state)
                self.write(b"b")
        elif isinstance(obj, tuple) and obj and obj[0] == "storage" and len(obj) == 5 and save_persistent_id:
            super().save(obj, False)
            self.write(b"Q")
        else:
            super().save(obj)


def storage(kind="FloatStorage", record="0", numel=6):
    return ("storage", Fake("torch", kind), record, "cpu", numel)


def tensor(store, offset=0, shape=(2, 3), stride=(3, 1), name="_rebuild_tensor_v2"):
    hooks = Call(Fake("collections", "OrderedDict"), ())
    return Call(Fake("torch._utils", name), (store, offset, shape, stride, False, hooks))


def pickled(content) -> bytes:
    file = io.BytesIO()
    Pickler(file, 2).dump(content)
    return file.getvalue()


def pth(path, content, records=(), *, compression=zipfile.ZIP_STORED, prefix="archive/", byteorder=b"little"):
    data = content if isinstance(content, bytes) else pickled(content)
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr(f"{prefix}data.pkl", data)
        archive.writestr(f"{prefix}byteorder", byteorder)
        for name, values in dict(records).items():
            archive.writestr(f"{prefix}data/{name}", values)
    return path


SIX = np.arange(6, dtype=np.float32)

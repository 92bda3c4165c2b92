"""The results file: every record ever made, by call, so that a later call continues where this one ended."""

import json
import pathlib
from typing import Any

NOT_MEASURED = "not measured"
_LIMIT = 1_000_000  # bytes of the file: what a rented machine gives back


class Results:
    """Records of cases, written after every one.

    Attributes:
      calls: id -> machine, versions, command and date of each call of `benchmarks.gpu`.
      records: in the order in which they were made; `call` names theirs.
    """

    def __init__(self, path: pathlib.Path, *, toy: bool, earlier: pathlib.Path | None = None):
        """Reads what `path` holds, else what `earlier` does."""
        self.path, self.toy = path, toy
        self.calls: dict[str, Any] = {}
        self.records: list[dict[str, Any]] = []
        for source in (path, earlier):
            if source is not None and source.exists():
                stored = json.loads(source.read_text())
                self.calls, self.records = stored["calls"], stored["results"]
                break

    def add(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        self.save()

    def save(self) -> None:
        """Beside the file and renamed: it is whole at any time, and so is what a killed call leaves."""
        said = (
            f"{NOT_MEASURED}: toy sizes in interpret mode on a CPU, which prove the script" if self.toy else "on a GPU"
        )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_name(self.path.name + ".part")
        head = json.dumps({"measured": said, "calls": self.calls}, indent=1, allow_nan=False).removesuffix("\n}")
        # A record a line: readable, and a tenth of the lines.
        lines = self._fitting(_LIMIT - len(head) - 100)
        part.write_text(f'{head},\n "results": [\n' + ",\n".join(lines) + "\n ]\n}\n")
        part.replace(self.path)

    def _fitting(self, limit: int) -> list[str]:
        """The records as JSON. Where they take more, those that a later one of their case replaces are forgotten, oldest first."""
        lines = {id(r): json.dumps(r, allow_nan=False) for r in self.records}
        size = sum(len(line) + 2 for line in lines.values())
        kept = {id(r) for r in self.latest().values()}
        for old in [r for r in self.records if id(r) not in kept]:
            if size <= limit:
                break
            size -= len(lines.pop(id(old))) + 2
        self.records = [r for r in self.records if id(r) in lines]
        return list(lines.values())

    def done(self, case: str, gpu: str | None = None) -> bool:
        """Whether the case has a result on a GPU of this kind: none that the budget cut short, nor wrong numbers.

        gpu: as `calls` have it, 'NVIDIA H200, ...'; None for any.
        """

        def is_one(r: dict[str, Any]) -> bool:
            there = self.calls.get(r["call"], {}).get("gpu")
            elsewhere = gpu is not None and there is not None and there.split(",")[0] != gpu.split(",")[0]
            is_wrong = any(part.get("ok") is False for part in r["parts"])
            return r["case"] == case and not (r.get("unfinished") or is_wrong or elsewhere)

        return any(map(is_one, self.records))

    def hung(self) -> dict[str, str]:
        """Kernel -> the case in which it hung: the last of its kernels, the one under test. A later result takes it back."""
        last = {r["case"]: r for r in self.records if not r.get("unfinished")}
        return {kernel: case for case, r in last.items() if r.get("hung") for kernel in r["kernels"][-1:]}

    def latest(self) -> dict[str, dict[str, Any]]:
        """Case -> its newest record; one that the budget cut short only where there is no other."""
        found: dict[str, dict[str, Any]] = {}
        for r in self.records:
            if not r.get("unfinished") or found.get(r["case"], r).get("unfinished"):
                found[r["case"]] = r
        return found

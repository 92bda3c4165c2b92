"""The results file: every record ever made, by call, so that a later call continues where this one ended."""

import json
import pathlib
from typing import Any

NOT_MEASURED = "not measured"


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
        content = {"measured": said, "calls": self.calls, "results": self.records}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_name(self.path.name + ".part")
        # A record a line: readable, and a tenth of the lines.
        lines = ",\n".join(json.dumps(r, allow_nan=False) for r in self.records)
        head = json.dumps({"measured": content["measured"], "calls": self.calls}, indent=1)
        part.write_text(head.removesuffix("\n}") + f',\n "results": [\n{lines}\n ]\n}}\n')
        part.replace(self.path)

    def done(self, case: str, call: str | None = None) -> bool:
        """Whether the case has a result, of whatever kind but cut short by the budget."""
        return any(r["case"] == case and not r.get("unfinished") and call in (None, r["call"]) for r in self.records)

    def hung(self) -> dict[str, str]:
        """Kernel -> the case in which it hung: the last of its kernels, the one under test. A later result takes it back."""
        last = {r["case"]: r for r in self.records if not r.get("unfinished")}
        return {kernel: case for case, r in last.items() if r.get("hung") for kernel in r["kernels"][-1:]}

    def latest(self) -> dict[str, dict[str, Any]]:
        """Case -> its newest record; one that the budget cut short only where there is no other."""
        found: dict[str, dict[str, Any]] = {}
        for r in self.records:
            if not r.get("unfinished") or r["case"] not in found:
                found[r["case"]] = r
        return found

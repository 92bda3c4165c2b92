"""Records of `benchmarks.gpu` as a call writes them, for tests, and the plan that they are of."""

from benchmarks.gpu_cases.plan import all_families

PLAN = all_families()
CASES = [case for family in PLAN for case in family.cases]


def names(families) -> list[str]:
    return [case.name for family in families for case in family.cases]


def record(case: str, *parts, stage: str = "speed", call: str = "now", config=None, **more):
    fields = {"family": "f", "kernels": [], "config": {"size": "14B", **(config or {})}, "expected": ""}
    return {"case": case, "stage": stage, "call": call, "parts": list(parts), **fields, **more}

"""One script a claim; each writes JSON into benchmarks/results/."""

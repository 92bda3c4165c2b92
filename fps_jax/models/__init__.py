"""The networks as pure functions of a config and nested dicts of arrays, and the tokenizer. Reads and writes no checkpoint."""

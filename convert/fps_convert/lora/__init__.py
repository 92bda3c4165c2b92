"""LoRA files: every spelling of keys that trainers write, read into one record, merged into weights; and ours written."""

"""Clips and captions on disk -> what training reads: latents and text states in a folder of shards (docs/data.md)."""

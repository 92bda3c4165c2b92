"""Parameters on disk and on devices: the door to any checkpoint, our format, and where each component lives. Knows the models."""

"""Parameters on disk and on devices: our format, and where each component lives. Knows the models, not what samples them."""

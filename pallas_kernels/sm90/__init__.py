"""The Hopper kernels (docs/kernels.md). Nothing of it is imported where no GPU needs it: Mosaic GPU takes a second."""

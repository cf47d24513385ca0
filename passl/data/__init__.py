"""Images to batches: data sets, transforms with an explicit random generator, multi-crop views, loaders."""

from passl.data import datasets, multi_crop, transforms  # noqa: F401  (fills the registries)

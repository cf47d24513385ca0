"""Images to batches: data sets, transforms with an explicit random generator, multi-crop views, loaders.

Importing this package registers the data sets and transforms; it does not import Paddle.
"""

from passl.data import datasets, erasing, masks, multi_crop, region_features, tar_dataset, transforms

__all__ = ["datasets", "erasing", "masks", "multi_crop", "region_features", "tar_dataset", "transforms"]

"""Public data sets: from their published archives, or the hub, into class folders or tarballs.

`cifar`, `imagenet` and `hub` say what is in a source: for each split a list of units (a batch file, the archive of a
class, a parquet file), each a stream of images. `output` writes them, whole or not at all, and goes on where it was
stopped.
"""

"""kdtrain: distil a large language or vision-language model into a small one from one YAML file.

Importing this package imports neither torch nor transformers, so that `kdtrain --help` and `kdtrain validate` answer
at once. The Python API lives in `kdtrain.config`, `kdtrain.trainer`, `kdtrain.losses` and `kdtrain.teachers`.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("kdtrain")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

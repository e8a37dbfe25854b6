"""Whether the installed libraries are those that kdtrain runs with: others fail late, in their own words."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement
from packaging.version import Version

from kdtrain.config.tree import Problem


def unfit_versions() -> Iterator[Problem]:
    """Libraries that are missing or too old; of newer ones it is only said that nobody has tried them."""
    for needed in _requirements():
        try:
            found = version(needed.name)
        except PackageNotFoundError:
            yield Problem((), f"the package {needed.name} is not installed", f"pip install '{needed}'")
            continue
        if needed.specifier.contains(found, prereleases=True):
            continue
        newer = all(Version(found) >= Version(one.version) for one in needed.specifier)
        message = f"{needed.name} {found} is installed, and kdtrain is for {needed.name} {needed.specifier}"
        yield Problem((), message, f"pip install '{needed}'", level="warning" if newer else "error")


def _requirements() -> list[Requirement]:
    """What kdtrain needs without its extras; nothing where it runs from sources that were never installed."""
    try:
        declared = [Requirement(text) for text in requires("kdtrain") or ()]
    except PackageNotFoundError:
        return []
    return [one for one in declared if one.marker is None or one.marker.evaluate({"extra": ""})]

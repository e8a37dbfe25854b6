"""How a run is gone on with, as one would type it."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence

from kdtrain.config.diagnose import clean


def resume_command() -> str:
    """The command of this process with `--resume auto`; for a run that Python code began, the argument that does it."""
    arguments = sys.argv[1:]
    if arguments[:1] != ["fit"]:
        return 'kdtrain.fit(…, resume="auto"), or kdtrain fit CONFIG --resume auto'
    kept = [one for one in _without(arguments, "--resume") if one != "--dry-run"]
    end = kept.index("--") if "--" in kept else len(kept)  # behind it nothing is an option
    return clean(shlex.join(["kdtrain", *kept[:end], "--resume", "auto", *kept[end:]]))


def insisting_command(allowed: Sequence[str]) -> str:
    """The command of this process, which allows these changes; for a run that Python code began, the argument."""
    arguments = sys.argv[1:]
    if arguments[:1] != ["fit"]:
        return f"kdtrain.fit(…, allow_changes={list(dict.fromkeys(allowed))})"
    kept = _without(arguments, "--allow-changes")
    return clean(shlex.join(["kdtrain", *kept, "--allow-changes", ",".join(dict.fromkeys(allowed))]))


def world_size_command() -> str:
    """The command of this process, which may go on with another number of processes."""
    arguments = sys.argv[1:]
    if arguments[:1] != ["fit"]:
        return "kdtrain.fit(…, allow_world_size_change=True)"
    end = arguments.index("--") if "--" in arguments else len(arguments)
    return clean(shlex.join(["kdtrain", *arguments[:end], "--allow-world-size-change", *arguments[end:]]))


def _without(arguments: Sequence[str], option: str) -> list[str]:
    """A command line without an option that has a value, in either form."""
    kept, names = [], iter(arguments)
    for argument in names:
        if argument == option:
            next(names, None)
        elif not argument.startswith(f"{option}="):
            kept.append(argument)
    return kept

"""How a run is gone on with, as one would type it."""

from __future__ import annotations

import shlex
import sys

from kdtrain.config.diagnose import clean

_OF_BEGINNING = ("--resume", "--dry-run")


def resume_command() -> str:
    """The command of this process with `--resume auto`; for a run that Python code began, the argument that does it."""
    arguments = sys.argv[1:]
    if arguments[:1] != ["fit"]:
        return 'kdtrain.fit(…, resume="auto"), or kdtrain fit CONFIG --resume auto'
    kept: list[str] = []
    names = iter(arguments)
    for argument in names:
        if argument == "--resume":
            next(names, None)
        elif argument.partition("=")[0] not in _OF_BEGINNING:
            kept.append(argument)
    end = kept.index("--") if "--" in kept else len(kept)  # behind it nothing is an option
    return clean(shlex.join(["kdtrain", *kept[:end], "--resume", "auto", *kept[end:]]))

"""A process of the command line: its log, how it fails, how a rank of several ends. Imports no torch by itself."""

from __future__ import annotations

import atexit
import contextlib
import io
import json
import logging
import os
import sys
import tempfile
import threading
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import typer

from kdtrain.cli.events import timed
from kdtrain.cli.last_words import to_say
from kdtrain.cli.terminal import printable, wrapped
from kdtrain.data.errors import show
from kdtrain.disk import FULL, failure_of, write_error
from kdtrain.errors import ConfigError, KdtrainError, LostRankError, PreflightError
from kdtrain.memory import is_out_of_memory, peak
from kdtrain.ranks import world_size
from kdtrain.runs.launch import report_exit_code

logger = logging.getLogger("kdtrain")

owns_process = False
"""Whether this process is the command's own, and ends with it."""
_LONGEST_END_S = 600.0  # at exit trackers upload what they have, and some wait for a network


def use_utf8() -> None:
    """Begin anew in Python's UTF-8 mode where the locale says that names and texts are in something else.

    Configs and rows are UTF-8 whatever a machine's locale is, and in them are names of files.
    """
    if sys.getfilesystemencoding().lower() != "utf-8" and sys.orig_argv and not sys.flags.utf8_mode:
        os.environ["PYTHONUTF8"] = "1"
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def require_utf8(arguments: Sequence[str]) -> None:
    """Refuse what cannot be written into any file.

    Raises:
        ConfigError: an argument is in another encoding.
    """
    for argument in arguments:
        try:
            argument.encode("utf-8")
        except UnicodeEncodeError:
            shown = ascii(os.fsencode(argument))[2:-1]
            raise ConfigError(
                f"An argument is not UTF-8: {shown}. Rename the file, or type the text as UTF-8."
            ) from None


def set_up_logging(log_format: str, debug: bool) -> None:
    """Our messages on stderr; the libraries' own only for --debug."""
    handler = _ToStderr()
    handler.setFormatter(_JsonFormatter() if log_format == "json" else _TextFormatter())
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO)
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "info" if debug else "error")
    if not debug:
        if owns_process:  # threads of libraries, TensorBoard's on a full disk; ours hand their errors on
            threading.excepthook = lambda _: None
        os.environ.setdefault("DATASETS_VERBOSITY", "error")
        logging.getLogger("matplotlib").setLevel(logging.ERROR)  # of a home that it cannot write to, and of fonts
        # transformers imports torchao wherever it is installed, which misses its GPU kernels on a CPU, in four lines.
        for name in ("torchao", "torch.utils._pytree"):
            logging.getLogger(name).setLevel(logging.ERROR)
        warnings.simplefilter("ignore")


def allow_many_files() -> None:
    """Open as many files as the system lets this user: each tensor of a data loader's worker is one."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def quiet_libraries(keep_bars: bool) -> None:
    """No progress bars of other libraries: they are noise in a log, and loading small files is not progress."""
    import datasets
    import transformers

    transformers.utils.logging.disable_progress_bar()
    if not keep_bars:
        datasets.disable_progress_bars()


def write_out(text: str) -> None:
    """Write a result to stdout, whatever its encoding."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.stdout.write(text)
    sys.stdout.flush()


def fail(error: KdtrainError) -> NoReturn:
    """Say what went wrong in one message and end; the traceback only for those who asked for it.

    Of several ranks one says it.
    """
    message = to_say(error, str(error))
    if "--debug" in sys.argv:
        logger.error("traceback", exc_info=error)
    if message is None:
        pass
    elif in_json():
        logger.critical(message, extra={"values": {"exit_code": error.exit_code}})
    elif isinstance(error, ConfigError) and "\n" in message:  # the problems of a file bring their own headings
        typer.echo(printable(message), err=True)
    else:
        typer.echo(wrapped(printable(f"kdtrain: {message}"), sys.stderr), err=True)
    # A lost rank's code is that of the rank that ended first.
    leave(error.exit_code, told=not isinstance(error, LostRankError))


def in_json() -> bool:
    """Whether the log is one of JSON objects."""
    return any(isinstance(handler.formatter, _JsonFormatter) for handler in logger.handlers)


def fail_with_a_bug(error: Exception) -> NoReturn:
    """End on an error that nobody has foreseen; its traceback is on stderr for --debug, and else in a file.

    Two are no bugs wherever they come up: memory that is exhausted, and a disk that is full.
    """
    if is_out_of_memory(error):
        fail(PreflightError(f"Out of memory: {peak()}. Free memory, take a smaller model, or lower data.max_length."))
    if (failure := failure_of(error)) and failure.code in FULL:
        fail(write_error(failure, Path(tempfile.gettempdir())))
    code = KdtrainError.exit_code
    if in_json():
        logger.critical(repr(error), extra={"values": {"exit_code": code}}, exc_info=error)
        leave(code)
    if "--debug" in sys.argv:
        traceback.print_exception(error)
        where = "above"
    else:
        where = _traceback_file(error)
    what = f"kdtrain: this is a bug ({show(error)}); please report it with the traceback {where} and `kdtrain env`."
    typer.echo(wrapped(what, sys.stderr), err=True)
    leave(code)


def _traceback_file(error: Exception) -> str:
    """Where the traceback is, in words: the run folder has it already, where there is one."""
    written = error.__dict__.get("error_log")
    if written is None:
        try:
            number, written = tempfile.mkstemp(prefix="kdtrain-error-", suffix=".log")
            with open(number, "w", encoding="utf-8", errors="backslashreplace") as file:
                traceback.print_exception(error, file=file)
        except OSError:  # no room there either
            traceback.print_exception(error)
            return "above"
    return f"in {written}"


def leave(code: int, *, told: bool = True) -> NoReturn:
    """End this process, with what the interpreter does as it ends; but not for ever.

    Args:
        told: whether the process that launched this one is told the code.
    """
    if told:
        report_exit_code(code)
    if owns_process and "torch" in sys.modules:
        watch = threading.Timer(_LONGEST_END_S, _end_now, [code])
        watch.daemon = True
        watch.start()
    end_rank(code)
    sys.exit(code)


def end_now(code: int) -> NoReturn:
    """End from a thread, where the main one is held by a library."""
    report_exit_code(code)
    os._exit(code)


def _end_now(code: int) -> None:
    logger.warning("A library has not ended within %.0f s, a tracker maybe: it is left alone.", _LONGEST_END_S)
    os._exit(code)


def end_rank(code: int) -> None:
    """Leave the other ranks, and end a rank of several without tearing the interpreter down; a single process goes on.

    gloo's threads may still run, and abort the interpreter as it ends.
    """
    if "torch" in sys.modules:
        import torch.distributed as dist

        if dist.is_available() and dist.is_initialized():
            if code == 0:  # together, or one takes the connection from the others; after a failure they may never come
                dist.barrier()
            dist.destroy_process_group()
    if world_size() == 1:
        return
    atexit._run_exitfuncs()  # trackers upload what they have
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class _ToStderr(logging.Handler):
    """Writes to what is stderr at that moment: a live bar puts itself in its place, and would be written over."""

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(ValueError):  # closed by somebody in this process: no reason to end a run
            sys.stderr.write(self.format(record) + "\n")
            sys.stderr.flush()


class _TextFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = printable(super().format(record))
        return wrapped(f"warning: {text}" if record.levelno == logging.WARNING else text, sys.stderr)


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        values = {"level": record.levelname, "message": record.getMessage(), **getattr(record, "values", {})}
        if record.exc_info:
            values["traceback"] = self.formatException(record.exc_info)
        return json.dumps(timed("message", **values))

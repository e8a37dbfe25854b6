"""The fault table: what kdtrain does about each fault, and the tests that show it. `make faults` runs all of them.

Run it as `python -m tests.faults [ROW …]`. It prints a row per fault with its tests and their time.
"""

from __future__ import annotations

import sys

from tests import tables
from tests.tables import Row as Fault

TABLE: dict[int, Fault] = {
    1: Fault("same config twice", "identical losses and weights"),
    2: Fault("resume from every saved step", "bitwise equal to the uninterrupted run"),
    3: Fault("kill -9 at nine points inside a save", "newest complete checkpoint used, skipped ones named"),
    4: Fault("kill -9 at random times", "resumes or starts clean, never a traceback"),
    5: Fault("damaged file in the newest checkpoint", "skipped with its reason, older one used; none left: exit 6"),
    6: Fault("--resume PATH of an incomplete checkpoint", "refused: which file and why, exit 6"),
    7: Fault("resume with changed model, tokenizer, loss or data", "refused with a key-by-key difference"),
    8: Fault("SIGTERM in forward, accumulation, generation, save", "checkpoint complete, exit 143, resume bitwise"),
    9: Fault("SIGINT once; twice", "as 8 with 130; at once, older checkpoint intact"),
    10: Fault("SIGTERM to one of two ranks", "both stop at the same step"),
    11: Fault("one rank raises or is killed", "status.json says failed, last complete checkpoint intact"),
    12: Fault("NaN or inf in loss, gradient, targets", "stop before the step, exit 5, origin named"),
    13: Fault("every token of a batch masked; of the data", "loss 0 with a gradient path; error before training"),
    14: Fault("disk full while saving", "exit 6 with path and bytes; older checkpoint intact"),
    15: Fault("output folder read-only, a file, not empty", "refused, nothing written, both ways out named"),
    16: Fault("checkpoints larger than the free disk", "a finding with the numbers"),
    17: Fault("teacher 429 with Retry-After, 503, reset, then fine", "same result as without; counted"),
    18: Fault("teacher slow or silent", "limits per request and in total, exit 4, state saved"),
    19: Fault("teacher 400, 401, 403, 404", "no retry, exit 4 (3 before training), key not shown"),
    20: Fault("teacher answers truncated JSON, HTML, another shape", "one retry, then an error with its beginning"),
    21: Fault("teacher's positions, ids or numbers are wrong", "refused with position and reason"),
    22: Fault("server restarts with another model", "noticed on reconnect"),
    23: Fault("redirects, other schemes, userinfo, plain http", "refused; the key goes to its origin only"),
    24: Fault("API key in the environment, in YAML, in a URL", "in no output and no file of the run"),
    25: Fault("YAML: tags, alias bomb, depth, size, duplicates", "exit 2, one line, under 1 s and 200 MB"),
    26: Fault("wrong types, unknown keys, conflicts", "all of them in one run, each with place and fix"),
    27: Fault("path traversal, symlinks in names", "the resolved path stays inside"),
    28: Fault("model folder with code or pickled weights", "refused without opt-in, payload never runs"),
    29: Fault("cache or data set with pickle or a script", "refused"),
    30: Fault("vocabulary or special tokens differ", "an error before training with sizes and first ids"),
    31: Fault("bad rows", "counted, first three shown; over the limit stops"),
    32: Fault("offline, broken hub cache", "file and variable named, no endless retry"),
    33: Fault("memory exhausted", "peak, batch, length and three remedies"),
    34: Fault("tracker fails", "training goes on, one warning, logging.jsonl complete"),
    35: Fault("push fails at the end", "model is saved first; retry command printed"),
    36: Fault("control characters in data, names, server errors", "shown escaped"),
    37: Fault("--help, validate, schema, env", "no torch imported, under 1 s"),
    38: Fault("two runs in one run directory", "second refused; a stale lock recognised"),
    39: Fault("resume into, or output_dir at, a model or data folder", "refused before anything is written"),
    40: Fault("model folder lacks or renames a weight", "exit 3 with the keys"),
    41: Fault("resume from an older checkpoint, stop, --resume auto", "the newest of the current line"),
    42: Fault("SIGHUP, SIGUSR1, SIGXCPU", "as 8"),
    43: Fault("launcher killed with -9", "workers end within 30 s, lock freed"),
    44: Fault("stdout or stderr closed or full", "training goes on, model saved, exit 0"),
    45: Fault("data file's content changed before a resume", "refused, or allowed by name"),
    46: Fault("NaN teacher writes answers or samples", "exit 5"),
    47: Fault("read-only HOME, few files, umask, C locale, odd paths", "runs; a temporary cache is said"),
    48: Fault("run folder moved or deleted meanwhile", "exit 6, nothing written elsewhere"),
    49: Fault("WORLD_SIZE set without a launcher", "a message within 20 s"),
    50: Fault("two processes encode the same data", "both succeed"),
    51: Fault("processor with matrix units, other call orders", "same numbers"),
}


if __name__ == "__main__":
    sys.exit(tables.run(TABLE, [int(row) for row in sys.argv[1:]] or list(TABLE), "fault"))

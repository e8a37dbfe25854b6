"""Sources that are read while training: what cannot stand beside `streaming: true`, where rows are not counted."""

from __future__ import annotations

from collections.abc import Iterator

from kdtrain.config.schema import RunConfig
from kdtrain.config.tree import KeyPath, Problem, Written


def streamed_sources(config: RunConfig, written: Written) -> Iterator[Problem]:
    """Streams and what needs the number of their rows."""
    for number, source in enumerate(config.data.eval_sources):
        if source.streaming:
            message = "evaluation reads the same rows every time, and cannot stream them"
            yield Problem(("data", "eval", number, "streaming"), message, "use limit, such as limit: 1000", on_key=True)
    if not config.data.streams:
        return
    for number, source in enumerate(config.data.train):
        path: KeyPath = ("data", "train", number)
        if not source.streaming:
            message = "stands beside a source that is streamed"
            yield Problem(path, message, "set streaming: true for all sources of data.train, or for none")
        if "[" in source.split:
            message = "is a slice, whose rows would have to be counted"
            yield Problem((*path, "split"), message, "use limit, or read it without streaming", on_key=True)
        if source.answers == "teacher":
            message = "is written before training, to rows that are counted, and data.train is streamed"
            hint = "remove streaming, or let it write while training, rlhf.seq_kd: true"
            yield Problem((*path, "answers"), message, hint, on_key=True)
    yield from _counted(config)


def _counted(config: RunConfig) -> Iterator[Problem]:
    """Options that count on the number of rows."""
    training = config.training
    if (training.get("max_steps") or -1) <= 0:
        what = "num_train_epochs" if "num_train_epochs" in training else "max_steps"
        message = "data.train is streamed, and nobody knows how many rows and epochs that are"
        hint = "set training.max_steps, the number of optimizer steps"
        yield Problem(("training", what), message, hint, on_key=what in training, missing=what not in training)
    for name in ("eval_strategy", "save_strategy", "logging_strategy"):
        if training.get(name) == "epoch":
            message = "data.train is streamed, and has no epochs"
            yield Problem(("training", name), message, "use steps", on_key=True)
    if training.get("train_sampling_strategy") == "group_by_length":
        message = "rows of like length are looked for among all, and data.train is streamed"
        hint = "remove it, or set data.padding_free: true or data.packing: true, which need no order"
        yield Problem(("training", "train_sampling_strategy"), message, hint, on_key=True)
    if config.data.eval_share is not None:
        message = "a share of the training rows would have to be read to its end, and data.train is streamed"
        yield Problem(("data", "eval"), message, "name rows of their own", on_key=True)
    if config.custom.sample_limit is not None:
        message = "is of rows that are counted, and data.train is streamed"
        yield Problem(("custom", "sample_limit"), message, "use limit of the source", on_key=True)

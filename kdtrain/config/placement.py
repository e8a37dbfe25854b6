"""Where the teacher's weights lie: what cannot be had, and what has no effect, as far as it is seen without torch."""

from __future__ import annotations

from collections.abc import Iterator

from kdtrain.config.schema import RunConfig
from kdtrain.config.tree import KeyPath, Problem, Written

_PATH: KeyPath = ("rlhf", "teacher", "placement")


def teacher_placement(config: RunConfig, written: Written) -> Iterator[Problem]:
    """A teacher is placed by one option."""
    teacher, kwargs = config.rlhf.teacher, config.rlhf.teacher_model_init_kwargs or {}
    if teacher.backend != "hf" or not config.asks_teacher or teacher.placement == "auto":
        return
    others = {
        "rlhf.teacher.device_map": teacher.device_map is not None,
        "rlhf.teacher_model_init_kwargs.device_map": "device_map" in kwargs,
    }
    if teacher.placement != "replicated":  # which is what a quantised one is
        others["rlhf.teacher.quantization"] = teacher.quantization is not None
        others["rlhf.teacher_model_init_kwargs.quantization_config"] = "quantization_config" in kwargs
    for option, is_set in others.items():
        if is_set:
            message = f"{teacher.placement} cannot be combined with {option}, which decides where the weights lie"
            yield Problem(_PATH, message, "remove one of the two options", on_key=True)
    if teacher.placement == "sharded" and config.answers_from_teacher:
        message = "sharded cannot be combined with answers: teacher yet: before training the teacher is whole"
        yield Problem(_PATH, message, "generate the answers in a run of its own, on one device or by a server")
    if teacher.placement == "cpu_offload" and config.training.get("use_cpu"):
        message = "cpu_offload moves weights between CPU and GPU, and training.use_cpu is true"
        yield Problem(_PATH, message, "remove one of the two options")
    if teacher.placement == "sharded" and config.launch.num_processes == 1:
        yield from written.idle(["placement"], "launch.num_processes is 1", "rlhf", "teacher")

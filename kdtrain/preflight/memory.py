"""How much memory each device of a run needs at most, by part, from the config and its models' configs alone.

What comes and goes is simulated (`simulated.py`); what stays is counted. The peak is the largest of what a run does by
turns: training a micro-batch, the teacher's forward, the optimizer's step, writing answers.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import torch

from kdtrain.config.schema import Placement, TunerConfig
from kdtrain.generation.batching import CALL_BYTES, DRAW_BYTES, cache_bytes
from kdtrain.generation.loop import ROOM_AT_FIRST
from kdtrain.losses.sizes import tile_bytes
from kdtrain.models.merging import WEIGHTS_PER_TOKEN
from kdtrain.preflight.optimizers import bytes_per_weight
from kdtrain.preflight.sharding import Sharding
from kdtrain.preflight.simulated import (
    ModelSetup,
    Shape,
    Step,
    simulate_inference,
    simulate_step,
    weights_of,
)

_CPU, _GPU = torch.device("cpu"), torch.device("cuda")


@dataclass(frozen=True)
class Writing:
    """Answers that a model in this process writes while training."""

    rows: int
    """Of a window."""
    rows_per_call: int | None
    """None is as many as have room, see `generation/batching.py`."""
    prompt: int
    """Tokens of the longest."""
    new_tokens: int


_MIXING_TILES = 2  # at a temperature other than 1, see `tile_bytes`


@dataclass(frozen=True)
class Setup:
    """What of a run decides what it takes."""

    student: ModelSetup
    teacher: ModelSetup | None
    """None where no other model is in this process."""
    tuner: TunerConfig
    shape: Shape
    """Of the student's micro-batch."""
    per_device_rows: int
    """`per_device_train_batch_size`: with several answers to a prompt a micro-batch has more rows."""
    teacher_rows: int = 0
    """Of the teacher's forward; 0 where no model in this process is asked."""
    optimizer: str = "adamw_torch_fused"
    moving_average: bool = False
    student_writes: Writing | None = None
    teacher_writes: Writing | None = None
    world: int = 1
    sharding: Sharding = field(default_factory=Sharding)
    placement: Placement = "auto"
    """Of the teacher."""
    other_teachers: tuple[tuple[ModelSetup, Placement], ...] = ()
    """Of several, those that are not the largest."""
    mixes: bool = False
    """Whether the mean of several teachers is made in the loss."""

    @property
    def teacher_pieces(self) -> int:
        """By how many devices the teacher's weights are divided."""
        return 1 if self.teacher is None else self.pieces_of(self.teacher, self.placement)

    def pieces_of(self, teacher: ModelSetup, placement: Placement) -> int:
        """The same of any."""
        if teacher.quantization is not None:
            return 1
        with_student = placement == "auto" and self.sharding.divided(self.world).teacher > 1
        return self.world if with_student or placement == "sharded" else 1


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes per device."""

    parts: dict[str, int]
    """By name, each at its largest; what is 0 is left out. They are not all there at the same time."""
    phases: dict[str, int]
    """What is there at the peak of each thing that a run does by turns."""

    @property
    def phase(self) -> str:
        """The one that takes the most."""
        return max(self.phases, key=lambda name: self.phases[name])

    @property
    def total(self) -> int:
        return self.phases[self.phase]


class Simulations:
    """What was simulated for a run: its plan with a change asks for much of the same again."""

    def __init__(self) -> None:
        self._steps: dict[object, Step] = {}
        self._forwards: dict[object, int] = {}

    def step(self, setup: Setup) -> Step:
        """The student's training step."""
        key = (_key(setup.student), setup.tuner.model_dump_json(), repr(setup.shape))
        if key not in self._steps:
            self._steps[key] = simulate_step(setup.student, setup.tuner, setup.shape)
        return self._steps[key]

    def forward(self, model: ModelSetup, shape: Shape) -> int:
        """A forward without gradients."""
        key = (_key(model), repr(shape))
        if key not in self._forwards:
            self._forwards[key] = simulate_inference(model, shape)
        return self._forwards[key]


def _key(model: ModelSetup) -> tuple[object, ...]:
    return id(model.config), model.dtype, model.attention, model.quantization


def plan_memory(setup: Setup, simulations: Simulations | None = None) -> MemoryPlan:
    """The plan of a run.

    Args:
        simulations: of another plan of the same run, which this one uses and adds to.

    Raises:
        NotSimulated: a model's code cannot be run without numbers.
    """
    simulations = simulations or Simulations()
    step, shape = simulations.step(setup), setup.shape
    pieces, scale = (
        setup.sharding.divided(setup.world, shape.micro_batches),
        setup.sharding.weight_scale(shape.autocast),
    )
    teacher, teacher_block = (0, 0) if setup.teacher is None else weights_of(setup.teacher)
    vocabulary = setup.student.config.get_text_config().vocab_size
    tile = tile_bytes(
        shape.rows * (shape.length - 1), vocabulary, torch.float32, _CPU if shape.on_cpu else _GPU,
        with_teacher=shape.teacher_width is not None, half=shape.is_half(setup.student.dtype),
        mixing_tiles=_MIXING_TILES * setup.mixes,
    )  # fmt: skip
    on_demand, head = _teacher_on_demand(setup, teacher)
    stays = {
        "student": int(scale * step.weights / pieces.weights),
        "optimizer": int(optimizer_bytes(setup, step.trained) / pieces.optimizer),
        "teacher": (0 if on_demand else int(teacher / setup.teacher_pieces)) + _other_teachers(setup),
        "the teacher's head": 0 if on_demand else head,
        "moving average": _moving_average(setup, step),
        "loss tile": tile if shape.on_cpu else 0,
    }
    gradients = int(scale * step.trained / pieces.gradients)
    buckets = step.trained if setup.world > 1 and pieces.is_ddp else 0
    of_deepspeed = _buckets(setup, step, scale)
    whole = 0 if pieces.weights == 1 else int(2 * scale * step.largest_block)
    whole += 0 if setup.teacher_pieces == 1 else teacher_block
    activations = max(step.forward, step.peak - step.trained)
    training = step.peak if setup.world == 1 else gradients + buckets + activations
    resident = sum(stays.values()) + of_deepspeed
    phases = {
        "training": resident + whole + training + (head if on_demand else 0),
        "the optimizer's step": resident + gradients + buckets + _step_scratch(setup, step),
    }
    written = {"KV cache": 0, "drawing tokens": 0, "copy for merging": 0}
    if setup.teacher_rows:
        kept = gradients + buckets if shape.micro_batches > 1 else 0
        phases["the teacher's forward"] = resident + whole + kept + on_demand + _teacher_forward(setup, simulations)
    for who, writing, model in (
        ("the student's answers", setup.student_writes, setup.student),
        ("the teacher's answers", setup.teacher_writes, setup.teacher),
    ):
        if writing is None or model is None:
            continue
        found = _writing(writing, model, shape, simulations)
        if model is setup.student:
            found["copy for merging"] = _merged(step, shape, writing.new_tokens)
        phases[who] = resident + whole + sum(found.values()) + (0 if model is setup.student else on_demand)
        written |= {name: max(size, written[name]) for name, size in found.items() if name in written}
    # On a GPU the tile is there beside the activations, in which the simulation has it.
    temporary = {"loss tile": tile, "activations": max(activations - (0 if shape.on_cpu else tile), 0)}
    parts = {
        "student": stays["student"], "gradients": gradients + buckets, "optimizer": stays["optimizer"],
        "teacher": stays["teacher"] + on_demand, "the teacher's head": head,
        "moving average": stays["moving average"], **temporary,
        "layers that are whole": whole, "DeepSpeed's buffer": of_deepspeed, **written,
    }  # fmt: skip
    return MemoryPlan({name: size for name, size in parts.items() if size}, phases)


def _other_teachers(setup: Setup) -> int:
    """Of several teachers those beside the largest, which stay on the device; one at a time runs."""
    stays = [
        weights_of(one)[0] / setup.pieces_of(one, placement)
        for one, placement in setup.other_teachers
        if placement != "cpu_offload" or setup.shape.on_cpu
    ]
    return int(sum(stays))


def _buckets(setup: Setup, step: Step, scale: float) -> int:
    """DeepSpeed's buffer of gradients, and the largest of them, which is whole until it is in the buffer.

    Twice, where embedding and head are one weight: each makes a gradient of it.
    """
    if not setup.sharding.bucket:
        return 0
    of_number = scale * setup.student.dtype.itemsize if setup.tuner.train_type == "full" else 4 * scale
    if setup.sharding.kind == "zero3":  # a whole gradient is among the layers that are whole
        return int(setup.sharding.bucket * of_number)
    tied = 2 if setup.student.config.get_text_config().tie_word_embeddings else 1
    return int(setup.sharding.bucket * of_number + tied * scale * step.largest_trained)


def _teacher_on_demand(setup: Setup, teacher: int) -> tuple[int, int]:
    """Bytes of a teacher that is on the device during its forward alone, and of a copy of its head.

    Targets keep the head until the loss is made: a copy, where the weights themselves are in pieces or gone by then.
    """
    if setup.teacher is None:
        return 0, 0
    text = setup.teacher.config.get_text_config()
    is_offloaded = setup.placement == "cpu_offload" and not setup.shape.on_cpu
    copied = is_offloaded or setup.teacher_pieces > 1
    return teacher if is_offloaded else 0, text.vocab_size * text.hidden_size * setup.teacher.dtype.itemsize * copied


def optimizer_bytes(setup: Setup, trained: int) -> float:
    """What an optimizer keeps for weights of so many bytes, on all devices together."""
    of_weight = 4 if setup.tuner.train_type == "lora" else setup.student.dtype.itemsize  # adapters are float32
    # DeepSpeed's optimizer works on a float32 copy of its piece, of weights that are float32 themselves too.
    master = trained if setup.sharding.kind.startswith("zero") else 0
    return bytes_per_weight(setup.optimizer, of_weight) * trained / of_weight + master


def _step_scratch(setup: Setup, step: Step) -> int:
    """Of optimizers that work on all weights at once: a tensor for each."""
    return step.trained if setup.optimizer == "adamw_torch" and not setup.shape.on_cpu else 0


def _moving_average(setup: Setup, step: Step) -> int:
    return int(step.trained * 4 / setup.student.dtype.itemsize) if setup.moving_average else 0


def _teacher_forward(setup: Setup, simulations: Simulations) -> int:
    shape = setup.shape
    seen = replace(shape, rows=setup.teacher_rows, micro_batches=1, checkpointing=False, teacher_width=None)
    return simulations.forward(setup.teacher or setup.student, seen)


def _writing(writing: Writing, model: ModelSetup, shape: Shape, simulations: Simulations) -> dict[str, int]:
    """Of one call; where the config does not say what keys and values take, the call is one of a micro-batch."""
    per_token = cache_bytes(SimpleNamespace(config=model.config, dtype=model.dtype))
    vocabulary = model.config.get_text_config().vocab_size
    positions = writing.prompt + writing.new_tokens
    if writing.new_tokens > ROOM_AT_FIRST:  # room grows by a quarter at a time
        positions += positions // 4
    of_row = DRAW_BYTES * vocabulary + positions * (per_token or 0)
    rows = writing.rows_per_call or (shape.rows if per_token is None else max(CALL_BYTES // of_row, 1))
    rows = min(rows, writing.rows)
    prompts = Shape(rows, max(writing.prompt, 2), autocast=shape.autocast, on_cpu=shape.on_cpu)
    return {
        "KV cache": rows * positions * (per_token or 0),
        "drawing tokens": rows * DRAW_BYTES * vocabulary,
        "reading the prompts": max(simulations.forward(model, prompts) - rows * DRAW_BYTES * vocabulary, 0),
    }


def _merged(step: Step, shape: Shape, new_tokens: int) -> int:
    """See `models/merging.py`."""
    if shape.autocast is not None:
        return 0
    copied = [size for size in step.adapted if size // 4 <= new_tokens * WEIGHTS_PER_TOKEN]
    return sum(copied) + max(copied, default=0)

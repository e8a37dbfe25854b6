"""What one step of a model allocates, found by running its own code on tensors that have shapes and no numbers.

A formula would have to know every architecture, attention kernel and adapter. The model's class knows them already: on
PyTorch's fake tensors its forward and backward allocate, keep and free what they would with numbers, in a second or
two and in no memory. Weights are not read.

Shapes: B rows, T positions, S supervised tokens, C tokens of a chunk, H hidden width, V vocabulary.
"""

from __future__ import annotations

import copy
import logging
import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedConfig

from kdtrain.config.schema import TunerConfig
from kdtrain.errors import KdtrainError
from kdtrain.losses.head import Head
from kdtrain.losses.sizes import tile_bytes
from kdtrain.models.loss_head import add_loss_head
from kdtrain.models.parts import freeze_parts
from kdtrain.models.pieces import without_zero3
from kdtrain.models.quantization import BYTES, Bits, empty_model, quantized_names
from kdtrain.models.tuning import adapter_config, fitted_adapter

_GPU = torch.device("cuda")
_QUANTIZED = "_kdtrain_quantized_to"
"""Attribute of a linear layer whose weight bitsandbytes would quantise. Its products take what those of a whole weight
that is frozen take, beside that weight, which is expanded for a moment."""
_PERIOD = 2
"""Layers of a model that is run without gradients: what they allocate is freed layer by layer."""


class NotSimulated(Exception):
    """A model's code needs numbers, such as which expert a token goes to; the text says what went wrong."""


@dataclass(frozen=True)
class ModelSetup:
    """A model as a run would load it."""

    config: PreTrainedConfig
    dtype: torch.dtype
    attention: str | None = None
    """Its `attn_implementation`; None is what transformers takes."""
    trust_remote_code: bool = False
    adapter: str | None = None
    """Folder of an adapter on it."""
    quantization: Bits | None = None


@dataclass(frozen=True)
class Shape:
    """What is run."""

    rows: int
    """B of a micro-batch."""
    length: int
    """T, of its longest row."""
    micro_batches: int = 1
    checkpointing: bool = False
    checkpointing_kwargs: dict[str, Any] | None = None
    autocast: torch.dtype | None = None
    teacher_width: int | None = None
    """H of the teacher, whose hidden states wait for the loss; None where it has none."""
    on_cpu: bool = False
    in_lines: bool = False
    """Whether rows lie behind each other (`data.packing`), for which attention takes a mask of [T, T]."""
    joined: bool = False
    """Whether all B of them do, in one line of B · T (`data.padding_free`)."""

    parts: int = 1
    """Into which the loss falls at most, by teacher: each makes a gradient of the head."""

    def is_half(self, dtype: torch.dtype) -> bool:
        """Whether hidden states are of half precision, in a model of a dtype."""
        return dtype.itemsize == 2 or self.autocast is not None

    @property
    def ids(self) -> tuple[int, int]:
        """Rows and columns of what a forward takes."""
        return (1, self.rows * self.length) if self.joined else (self.rows, self.length)


@dataclass(frozen=True)
class Step:
    """Bytes of the student's training step."""

    weights: int
    trained: int
    """Of the weights that get a gradient: the gradients' too."""
    largest_block: int
    """Weights of the largest of its layers, and of the embedding and head: what is whole at a time where they are in
    pieces."""
    forward: int
    """At the peak, beside the weights: what a first forward keeps and allocates, before there are gradients."""
    peak: int
    """At the peak, beside the weights: activations, gradients, and the loss's tile where it is no buffer that stays."""
    largest_trained: int
    """Of the largest weight that gets a gradient."""
    adapted: tuple[int, ...]
    """Of each float32 weight under an adapter: `models/merging.py` may copy it."""


class _LiveBytes(TorchDispatchMode):
    """Counts the storages that are alive, each once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._alive:
            return

        def freed(_: Any) -> None:
            self.now -= size
            del self._alive[key]

        self._alive[key] = weakref.ref(storage, freed)
        self.now += size
        self.peak = max(self.peak, self.now)


@contextmanager
def _fake() -> Iterator[_LiveBytes]:
    """Whatever is made inside has no numbers and is counted.

    Raises:
        NotSimulated: of anything that goes wrong but an error of ours.
    """
    with _or_not_simulated(), FakeTensorMode(allow_non_fake_inputs=True), _LiveBytes() as live:
        yield live


@contextmanager
def _or_not_simulated() -> Iterator[None]:
    """Whatever a model's own code raises where it has no numbers, or cannot be built: loading it says so better.

    Nothing is logged meanwhile: what building a model says is said when it is built.
    """
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with without_zero3():
            yield
    except (KdtrainError, NotSimulated):
        raise
    except Exception as error:
        said = str(error).strip() or "no message"
        raise NotSimulated(f"{type(error).__name__}: {said.splitlines()[0][:120]}") from error
    finally:
        logging.disable(before)


def simulate_step(setup: ModelSetup, tuner: TunerConfig, shape: Shape) -> Step:
    """The student's forward, loss and backward; a second time where gradients add up.

    Raises:
        NotSimulated: the model's code needs numbers.
    """
    model = _student(setup, tuner, shape)
    with _fake() as live:
        _materialize(model)
        before, forward = live.now, 0
        live.peak = before
        for _ in range(min(shape.micro_batches, 2)):
            loss = _loss(model, shape)
            forward = forward or live.peak - before
            loss.backward()
            del loss
        weights, trained = _sizes(model)
        whole = _largest_expanded(model)
        peak = live.peak - before + whole
        largest = max((p.nbytes for p in model.parameters() if p.requires_grad), default=0)
        return Step(weights, trained, _largest_block(model), forward + whole, peak, largest, _adapted(model))


def student_sizes(setup: ModelSetup, tuner: TunerConfig) -> tuple[int, int]:
    """Bytes of a student's weights, its adapter's among them, and of those that are trained.

    Raises:
        NotSimulated: the model cannot be built.
    """
    return _sizes(_student(setup, tuner, Shape(1, 2)))


def _sizes(model: nn.Module) -> tuple[int, int]:
    return sum(_weights(model).values()), sum(p.nbytes for p in model.parameters() if p.requires_grad)


def _weights(model: nn.Module) -> dict[int, int]:
    """Bytes of a model's parameters by their identity: tied ones once, quantised ones as bitsandbytes has them."""
    sizes = {id(p): p.nbytes for p in model.parameters()}
    for module in model.modules():
        if (bits := getattr(module, _QUANTIZED, None)) is not None:
            weight: Any = module.weight
            sizes[id(weight)] = math.ceil(weight.numel() * BYTES[bits])
    return sizes


def _largest_expanded(model: nn.Module) -> int:
    """Bytes of the largest quantised weight in the dtype of its product, which is made of it for a moment."""
    marked: list[Any] = [module for module in model.modules() if hasattr(module, _QUANTIZED)]
    return max((module.weight.nbytes for module in marked), default=0)


def weights_of(setup: ModelSetup) -> tuple[int, int]:
    """Bytes of a model's weights, tied ones once, and of its largest block (see `Step`).

    Raises:
        NotSimulated: the model cannot be built.
    """
    model = _build(setup)
    block = _largest_block(model)
    if setup.adapter is not None:
        with _or_not_simulated():
            model = get_peft_model(model, PeftConfig.from_pretrained(setup.adapter))
    return sum(_weights(model).values()), block


def simulate_inference(setup: ModelSetup, shape: Shape) -> int:
    """Bytes that a forward without gradients and without a cache allocates at most, beside the weights.

    Raises:
        NotSimulated: the model's code needs numbers.
    """
    model = _build(replace(setup, config=_fewer_layers(setup.config))).eval()
    with _fake() as live, torch.no_grad():
        _materialize(model)
        before = live.peak = live.now
        with _autocast(shape):
            _backbone_forward(model, shape, lambda hidden, head, outputs: (hidden[:0],))
        return live.peak - before + _largest_expanded(model)


def _student(setup: ModelSetup, tuner: TunerConfig, shape: Shape) -> Any:
    """As a run and its trainer make it."""
    with _or_not_simulated():
        return _wrapped(_build(setup), setup, tuner, shape)


def _wrapped(model: Any, setup: ModelSetup, tuner: TunerConfig, shape: Shape) -> Any:
    freeze_parts(model, **tuner.frozen)
    if setup.adapter is not None:
        adapter: Any = PeftConfig.from_pretrained(setup.adapter)
        adapter.inference_mode = False
    elif (adapter := adapter_config(tuner, model)) is not None:
        adapter = fitted_adapter(model, adapter)
    if adapter is not None:
        model = get_peft_model(model, adapter)
    if shape.checkpointing and getattr(model, "supports_gradient_checkpointing", True):
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable(shape.checkpointing_kwargs or {"use_reentrant": False})
        if adapter is not None:
            model.enable_input_require_grads()
    return model.train()


def _build(setup: ModelSetup) -> Any:
    """On the meta device."""
    options = {} if setup.attention is None else {"attn_implementation": setup.attention}
    with _or_not_simulated():
        model = empty_model(setup.config, setup.dtype, setup.trust_remote_code, **options)
        for name in () if setup.quantization is None else quantized_names(model):
            setattr(model.get_submodule(name.removesuffix(".weight")), _QUANTIZED, setup.quantization)
        add_loss_head(model)
    return model


def _materialize(model: nn.Module) -> None:
    """The same weights on the CPU, fake ones: what the meta device runs is not what a device would."""
    made: dict[int, torch.Tensor] = {}

    def on_cpu(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in made:
            empty = torch.empty_like(tensor, device="cpu")
            is_parameter = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
        return made[id(tensor)]

    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = on_cpu(tensor)  # type: ignore[assignment]


def _fewer_layers(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of a model with the first layers only, of each kind at least one."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    kinds = list(getattr(text, "layer_types", None) or ())
    count = max([_PERIOD, *(kinds.index(kind) + 1 for kind in set(kinds))])
    if count < text.num_hidden_layers:
        text.num_hidden_layers = count
        if kinds:
            text.layer_types = kinds[:count]
    return config


def _loss(model: Any, shape: Shape) -> torch.Tensor:
    tokens = shape.rows * (shape.length - 1)  # supervised at most
    teacher_SH = None if shape.teacher_width is None else torch.empty(tokens, shape.teacher_width)

    def loss_head(hidden_BTH: torch.Tensor, head: Head, outputs: Any) -> tuple[torch.Tensor]:
        hidden_SH = hidden_BTH[:, :-1].flatten(0, 1)[torch.arange(tokens)]
        return (_LossOfShape.apply(hidden_SH, head.weight, teacher_SH, shape),)

    with _autocast(shape):
        return _backbone_forward(model, shape, loss_head)[0]


def _backbone_forward(model: Any, shape: Shape, loss_head: Callable[..., Any]) -> Any:
    rows, columns = shape.ids
    ids = torch.zeros(rows, columns, dtype=torch.long)
    # One row alone has no padding, and attention then needs no mask of [T, T].
    mask = {} if rows == 1 else {"attention_mask": torch.ones_like(ids)}
    if shape.in_lines:
        mask = {"attention_mask": torch.ones(rows, 1, columns, columns, dtype=torch.bool)}
    return model(input_ids=ids, **mask, use_cache=False, loss_head=loss_head)


def _autocast(shape: Shape) -> AbstractContextManager[Any]:
    return nullcontext() if shape.autocast is None else torch.autocast("cpu", dtype=shape.autocast)


class _LossOfShape(torch.autograd.Function):
    """What `losses/fused.py` allocates, without its numbers: there chunks are chosen by reading the labels."""

    @staticmethod
    def forward(
        ctx: Any, hidden_SH: torch.Tensor, weight_VH: torch.Tensor, teacher_SH: torch.Tensor | None, shape: Shape
    ) -> torch.Tensor:
        wide = torch.promote_types(hidden_SH.dtype, torch.float32)
        supervised_SH = hidden_SH.clone()
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        gradients = [
            torch.empty_like(like, dtype=wide) if wanted else None
            for like, wanted in ((supervised_SH, wants_hidden), (weight_VH, wants_weight))
        ]
        if not shape.on_cpu:  # on a CPU its buffers stay from one step to the next
            tile = tile_bytes(
                len(hidden_SH), len(weight_VH), wide, _GPU,
                with_teacher=teacher_SH is not None, half=shape.is_half(hidden_SH.dtype),
            )  # fmt: skip
            torch.empty(tile, dtype=torch.uint8)
        # Of a loss in parts they are of a part's tokens each, and of the whole head: all wait for backward.
        of_others = [torch.empty_like(weight_VH, dtype=wide) for _ in range(shape.parts - 1) if wants_weight]
        ctx.run_gradients, ctx.of_others = gradients, of_others
        ctx.dtypes = hidden_SH.dtype, weight_VH.dtype
        return hidden_SH.new_zeros(())

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        gradients, ctx.run_gradients = ctx.run_gradients, None
        hidden, weight = (
            None if one is None else one.to(dtype) for one, dtype in zip(gradients, ctx.dtypes, strict=True)
        )
        del ctx.of_others
        return hidden, weight, None, None


def _largest_block(model: nn.Module) -> int:
    """The layers are what model code keeps in lists; what is outside of them is whole all the time."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    sizes = _weights(model)
    blocks = [sum(sizes[id(p)] for p in block.parameters()) for blocks in lists for block in blocks]
    inside = {id(p) for blocks in lists for p in blocks.parameters()}
    outside = sum(size for key, size in sizes.items() if key not in inside)
    return outside + max(blocks, default=0)


def _adapted(model: nn.Module) -> tuple[int, ...]:
    if not isinstance(model, PeftModel):
        return ()
    layers = [module.get_base_layer() for module in model.modules() if isinstance(module, Linear)]
    weights = [layer.weight for layer in layers if not hasattr(layer, _QUANTIZED)]
    return tuple(weight.nbytes for weight in weights if weight.dtype == torch.float32)

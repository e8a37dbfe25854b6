"""The model card of an exported student: what it is, how it was made, what it reaches, and the config.

It is for other people: no secret, and no path of this machine, stands in it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
import trl
import yaml
from huggingface_hub import ModelCard, ModelCardData, hf_hub_download

from kdtrain import __version__
from kdtrain.config import RunConfig
from kdtrain.config.adapters import model_below
from kdtrain.config.diagnose import is_secret_name, redact
from kdtrain.config.in_words import divergence_in_words
from kdtrain.config.model_folder import read_map
from kdtrain.data.errors import show
from kdtrain.runs.folder import EVALUATION, LOG
from kdtrain.runs.open_run import TrainedRun
from kdtrain.runs.records import read_records

# Title, field and form of a model's figures in evaluation.json.
_FIGURES = (
    ("CE", "ce", ".4f"),
    ("perplexity", "perplexity", ",.2f"),
    ("token accuracy", "token_accuracy", ".1%"),
    ("right answers", "accuracy", ".1%"),
    ("KL(T‖S)", "forward_kl", ".4f"),
    ("KL(S‖T)", "reverse_kl", ".4f"),
    ("agreement", "agreement", ".1%"),
    ("ECE", "ece", ".3f"),
)
_MODELS = {"before": "student before training", "after": "this model", "teacher": "teacher"}
# What says where something runs, and not what is made.
_OF_THE_MACHINE = {"output_dir", "logging_dir", "cache_dir", "base_url", "api_key_env", "launch"}


@dataclass(frozen=True)
class Saved:
    """The model as it was written."""

    name: str
    """The folder's, or the repository's."""
    architecture: str
    parameters: int
    dtype: str
    version: int
    """Of transformers, that reads it."""
    reads_images: bool
    chats: bool
    """Whether it has a chat template."""


def model_card(run: TrainedRun, saved: Saved) -> str:
    """The text of `README.md`."""
    sections = (
        f"# {saved.name.rpartition('/')[2]}",
        _what(run.config, saved),
        "## Use\n\n" + _use(saved),
        "## Method\n\n" + "\n".join(f"- {line}" for line in _method(run)),
        "## Figures\n\n" + _figures(run),
        "## Config\n\nWhat differs from kdtrain's defaults; files by their names alone.\n\n" + _config(run.config),
        "## Licence\n\n" + _licence(run.config),
        "## Made with\n\n" + _versions(saved),
    )
    return f"---\n{_metadata(run.config, saved)}\n---\n\n" + "\n\n".join(sections) + "\n"


# ---- what it is ------------------------------------------------------------------------------------------------------


def _metadata(config: RunConfig, saved: Saved) -> str:
    base = model_below(config.model.model)
    licence = _licence_of(base, config.model.revision)
    hub_data = [source.path for source in config.data.train if not source.is_local]
    data = ModelCardData(
        base_model=None if os.path.isabs(base) else base,
        datasets=hub_data or None,
        library_name="transformers",
        pipeline_tag="image-text-to-text" if saved.reads_images else "text-generation",
        tags=["kdtrain", *(["knowledge-distillation"] if config.asks_teacher else [])],
        **licence,
    )
    return str(data.to_yaml())


def _what(config: RunConfig, saved: Saved) -> str:
    by = f", distilled from {_teacher(config)}" if config.asks_teacher else ", fine-tuned"
    student = _shown(model_below(config.model.model))
    return f"{student}{by}. {saved.architecture}, {saved.parameters:,} parameters in {saved.dtype}."


def _teacher(config: RunConfig) -> str:
    if config.rlhf.teachers:
        listed = [f"{_teacher(one)} ({name})" for name, one in config.by_teacher.items()]
        how = "the mean of" if config.rlhf.mix else "several teachers, each for its rows:"
        return f"{how} {', '.join(listed)}"
    teacher = config.rlhf.teacher
    if teacher.backend == "self":
        return f"itself (weights: {teacher.weights})"
    name = config.rlhf.teacher_model or teacher.model
    return f"{_shown(name)}{' with an adapter' if teacher.adapter else ''}" if name else "cached targets"


def _shown(name: str) -> str:
    """A name that says nothing of this machine: of a folder the last part."""
    return show(f"{Path(name).name} (a local folder)" if os.path.isabs(name) else name)


def _use(saved: Saved) -> str:
    if saved.reads_images:
        auto, processing, made = "AutoModelForImageTextToText", "AutoProcessor", "processor"
        content = '[{"type": "image", "url": "picture.png"}, {"type": "text", "text": "What is this?"}]'
    else:
        auto, processing, made, content = "AutoModelForCausalLM", "AutoTokenizer", "tokenizer", '"What is new?"'
    lines = [
        "```python",
        f"from transformers import {', '.join(sorted((auto, processing)))}",
        "",
        f'{made} = {processing}.from_pretrained("{saved.name}")',
        f'model = {auto}.from_pretrained("{saved.name}", dtype="auto")',
        *(_chat(made, content) if saved.chats else [f'inputs = {made}("What is new?", return_tensors="pt")']),
        "answer = model.generate(**inputs, max_new_tokens=256)",
        f'print({made}.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
        "```",
        "",
        f"Or serve it: `vllm serve {saved.name}`.",
    ]
    return "\n".join(lines)


def _chat(made: str, content: str) -> list[str]:
    return [
        f'messages = [{{"role": "user", "content": {content}}}]',
        f"inputs = {made}.apply_chat_template(",
        '    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"',
        ")",
    ]


# ---- how it was made -------------------------------------------------------------------------------------------------


def _method(run: TrainedRun) -> Iterator[str]:
    config, rlhf = run.config, run.config.rlhf
    if config.options.lm_kd_active:
        ce = f", and {rlhf.sft_alpha:g} × cross-entropy" if rlhf.sft_alpha else ""
        what = f"{divergence_in_words(config)} from the teacher"
        if config.options.crosses_tokenizers:
            what = f"`{rlhf.cross_tokenizer}` from the teacher, which has another tokenizer"
        yield f"Loss: {rlhf.llm_kd_weight:g} × {what}{ce}."
        yield (
            f"On the student's own answers in {rlhf.lmbda:.0%} of the steps."
            if rlhf.lmbda
            else "On the answers of the data, none of the student's own."
        )
    else:
        yield "Loss: cross-entropy."
    if config.options.visual_kd is not None:
        yield f"Visual features of the teacher were learnt beside it: {', '.join(config.custom.visual_kd.targets)}."
    if config.options.hidden_kd is not None:
        depths = ", ".join(f"{depth:g}" for depth in config.options.hidden_kd.targets.layer)
        yield f"Hidden states of the teacher were learnt beside it, at the depths {depths}."
    if config.answers_from_teacher:
        yield "The teacher has written answers that were trained on (sequence-level distillation)."
    if config.asks_teacher:
        yield f"Teacher: {_teacher(config)}."
    is_lora = config.tuner.train_type == "lora"
    yield f"Trained: {'an adapter (LoRA), merged into the weights' if is_lora else 'all weights'}."
    if config.model.quantization is not None:
        yield (
            f"The adapter was trained on weights quantised to {config.model.quantization}; these are the weights as "
            "they were before, with the adapter in them."
        )
    sources = ", ".join(show(Path(one.path).name if one.is_local else one.path) for one in config.data.train)
    yield f"Data: {sources}."
    last = _last_record(run, "loss")
    if last is not None:
        yield f"Optimizer steps: {last['step']:,}{f', of which this is {run.checkpoint}' if run.checkpoint else ''}."


def _last_record(run: TrainedRun, key: str) -> Mapping[str, Any] | None:
    """The last line of the log that has a key; of a checkpoint, that of its step or the one before."""
    step = (run.checkpoint or "").rpartition("-")[2]
    limit = int(step) if step.isdecimal() else None
    found = None
    log = run.folder / LOG
    for record in read_records(log)[0] if log.is_file() else ():
        if key in record and "step" in record and (limit is None or record["step"] <= limit):
            found = record
    return found


# ---- what it reaches -------------------------------------------------------------------------------------------------


def _figures(run: TrainedRun) -> str:
    found = read_map(run.folder / EVALUATION)
    if found and found.get("checkpoint") == run.checkpoint:
        return _evaluation(found)
    last = _last_record(run, "eval_loss")
    if last is None:
        return "Not evaluated."
    figures = [f"| {name} | {last[name]:.4g} |" for name in sorted(last) if _is_figure(name, last[name])]
    return f"At the evaluation of step {last['step']:,}:\n\n| | |\n|---|--:|\n" + "\n".join(figures)


def _is_figure(name: str, value: Any) -> bool:
    of_speed = ("runtime", "per_second", "peak_memory")
    return name.startswith("eval_") and isinstance(value, int | float) and not any(one in name for one in of_speed)


def _evaluation(found: Mapping[str, Any]) -> str:
    models = {title: figures for name, title in _MODELS.items() if (figures := found["models"].get(name))}
    lines = [
        f"| | {' | '.join(title for title, _, _ in _FIGURES)} |",
        f"|---|{'--:|' * len(_FIGURES)}",
        *(
            f"| {title} | {' | '.join(_cell(figures.get(field), form) for _, field, form in _FIGURES)} |"
            for title, figures in models.items()
        ),
        "",
        f"On {found['rows']:,} rows. T is the teacher, S the student; CE and KL in nats per token.",
    ]
    if found.get("gap_closed") is not None:
        lines.append(f"Share of the gap to the teacher closed in CE: {found['gap_closed']:.1%}.")
    if found.get("verdict"):
        against = found.get("against") or {}
        unit = f" {against['unit']}" if against.get("unit") else ""
        difference = f": CE {against['difference']:+.4f}{unit}" if against.get("difference") is not None else ""
        lines.append(f"Verdict against another run of the same data: {found['verdict']}{difference}.")
    return "\n".join(lines)


def _cell(value: Any, form: str) -> str:
    return format(value, form) if isinstance(value, int | float) else "–"


# ---- config, licence, versions ---------------------------------------------------------------------------------------


def _config(config: RunConfig) -> str:
    whole, changed = (config.model_dump(mode="json", by_alias=True, exclude_defaults=only) for only in (False, True))
    text = yaml.safe_dump(
        public(_switched_on(changed, whole)),
        sort_keys=False,
        allow_unicode=True,
    )
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}yaml\n{text}{fence}"


def _switched_on(changed: Any, whole: Any) -> Any:
    """What was changed; a section that is on with its own defaults, which would be empty, as a whole."""
    if not isinstance(changed, dict) or not isinstance(whole, dict):
        return changed
    return {name: _switched_on(one, whole[name]) for name, one in changed.items()} if changed else whole


def public(value: Any) -> Any:
    """A part of a config for everybody: without secrets and addresses, and with the last part of each path."""
    if isinstance(value, dict):
        return {
            name: public(one) for name, one in value.items() if name not in _OF_THE_MACHINE and not is_secret_name(name)
        }
    if isinstance(value, list):
        return [public(one) for one in value]
    if not isinstance(value, str):
        return value
    is_path = os.path.isabs(value) or value.startswith(("~", "file:"))
    return Path(value).name if is_path else redact(value)


def _licence(config: RunConfig) -> str:
    base = model_below(config.model.model)
    known = _licence_of(base, config.model.revision)
    name = known.get("license_name") or known.get("license")
    of_base = f"{show(str(name))}, as {_shown(base)}." if name else f"That of {_shown(base)} holds; see there."
    backends = {one.rlhf.teacher.backend for one in config.by_teacher.values()}
    if not config.asks_teacher or backends == {"self"}:
        return of_base
    return f"{of_base} The teacher's licence may say more about models that were trained on what it says."


def _licence_of(base: str, revision: str | None) -> dict[str, Any]:
    """What the card of the base says of its licence; empty where that is not known."""
    try:
        path = (
            Path(base) / "README.md" if os.path.isabs(base) else hf_hub_download(base, "README.md", revision=revision)
        )
        data = ModelCard.load(path).data.to_dict()
    except Exception:  # there is no card, no network, or what is there is no card
        return {}
    return {name: data[name] for name in ("license", "license_name", "license_link") if isinstance(data.get(name), str)}


def _versions(saved: Saved) -> str:
    own = (("kdtrain", __version__), ("transformers", transformers.__version__), ("trl", trl.__version__))
    used = ", ".join(
        f"{name} {version}" for name, version in (*own, ("peft", peft.__version__), ("torch", torch.__version__))
    )
    read_by = "transformers 4 and 5 read it" if saved.version == 4 else "transformers 5 reads it"
    return f"{used}; {read_by}."

"""What the command line says of a cache, beside its config, and what no cache can be written of."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from kdtrain.config import RunConfig
from kdtrain.errors import ConfigError
from kdtrain.teachers.cached.store import Mode

DEFAULT_ENTRIES = 50


@dataclass(frozen=True)
class Wanted:
    """What the command line says of a cache, beside its config."""

    mode: Mode | None = None
    """None: `chunks` of a teacher with another tokenizer, else `topk`."""
    top_k: int | None = None
    """None: `rlhf.teacher.top_k` of a server, else 50."""
    draws: int = DEFAULT_ENTRIES
    hidden_dtype: Literal["auto", "int8"] = "auto"
    verify: int = 0
    """Rows that are computed once more, and compared with what is stored."""

    def of(self, config: RunConfig) -> Wanted:
        """With the mode that the config asks for, where none is named."""
        return self if self.mode else replace(self, mode="chunks" if config.options.crosses_tokenizers else "topk")

    def entries(self, config: RunConfig) -> int | None:
        """K, or draws."""
        of_teacher = config.rlhf.teacher.top_k if config.rlhf.teacher.is_served else DEFAULT_ENTRIES
        return {"topk": self.top_k or of_teacher, "sample": self.draws}.get(self.mode or "")

    def identity(self, config: RunConfig) -> dict[str, Any]:
        """As a part of `Manifest.made_from`, under the names of the command line."""
        if self.mode == "chunks":
            return {"--mode": self.mode}
        option = {"topk": "--top-k", "sample": "--draws", "hidden": "--hidden-dtype"}[self.mode or ""]
        return {"--mode": self.mode, option: self.entries(config) or self.hidden_dtype}


def require_cachable(config: RunConfig, wanted: Wanted) -> None:
    """Refuse what has no targets that could be written once.

    Raises:
        ConfigError: which option stands against it.
    """
    rlhf, backend = config.rlhf, config.rlhf.teacher.backend
    if rlhf.teachers:
        raise ConfigError(
            "rlhf.teachers has several, and a cache is of one: write one for each by a config that names it alone "
            "(rlhf.teacher_model or rlhf.teacher, and data.train with its rows), and then give each its cache here "
            "(rlhf.teachers: {NAME: {backend: cache, path: DIR}})."
        )
    if backend == "cache":
        raise ConfigError("rlhf.teacher.backend is cache: a cache is written by the teacher that it stands in for.")
    if not config.options.lm_kd_active:
        raise ConfigError("rlhf.llm_kd_weight is 0: no targets of a teacher are used, and so none can be cached.")
    _require_mode(config, wanted)
    if rlhf.lmbda == 1 or rlhf.seq_kd:
        option = "rlhf.lmbda is 1" if rlhf.lmbda == 1 else "rlhf.seq_kd is true"
        raise ConfigError(
            f"{option}: answers are generated while training, and there is nothing that could be cached before. Set "
            "rlhf.lmbda: 0 and rlhf.seq_kd: false to train on the data's answers, or on the teacher's that are written "
            "once (answers: teacher in a data source)."
        )
    for name in ("visual_kd", "hidden_kd"):
        if getattr(config.options, name) is not None:
            raise ConfigError(
                f"custom.{name} compares features of a teacher that runs, and a cache has none: disable it."
            )
    if backend == "self" and rlhf.teacher.weights != "base":
        raise ConfigError(
            f"rlhf.teacher.weights is {rlhf.teacher.weights}: this teacher learns with the student, and what it says "
            "now is not what it says later. Only weights: base can be cached."
        )
    if config.rlhf.teacher.is_served and wanted.mode not in ("topk", "chunks"):
        raise ConfigError(
            f"--mode {wanted.mode} needs the teacher's whole distributions, and a server gives its top k."
        )


def _require_mode(config: RunConfig, wanted: Wanted) -> None:
    """Refuse a mode for the student's own tokens beside `cross_tokenizer`, and the other way round."""
    if config.rlhf.cross_tokenizer == "uld":
        raise ConfigError(
            "rlhf.cross_tokenizer: uld needs the teacher's distributions at its own tokens, which no cache holds: take "
            "alm, whose likelihoods of chunks are cached, or train with the teacher itself (rlhf.teacher.backend: hf)."
        )
    if config.options.crosses_tokenizers and wanted.mode != "chunks":
        raise ConfigError(
            f"--mode {wanted.mode} stores what the teacher says of the student's tokens, and rlhf.cross_tokenizer: alm "
            "compares chunks of text: leave --mode out, which is then chunks."
        )
    if wanted.mode == "chunks" and not config.options.crosses_tokenizers:
        raise ConfigError(
            "--mode chunks stores likelihoods of chunks of text, of a teacher with another tokenizer: set "
            "rlhf.cross_tokenizer: alm, or leave --mode out."
        )

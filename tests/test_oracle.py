"""Trained weights, after five optimizer steps, equal those of a plain float64 loop (`oracle.py`) to 1e-5.

The bound is on the largest absolute difference of any weight. Weights move by a hundredth and more in these runs, so a
gradient that is wrong by a tenth of a percent shows. Optimizers are ones that do not blow up rounding:
SGD, with and without momentum, and AdamW with an epsilon of 1e-2.
"""

from __future__ import annotations

import functools
import os
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

from kdtrain.data.batch import Batch
from kdtrain.trainer import GKDTrainerWithMetrics
from tests import tiny, tiny_vision
from tests.oracle import Loss, Optimizer, Oracle, Row, Window, double
from tests.test_trainer import make_args
from tests.tiny import lora_config

STEPS = 5
BOUND = 1e-5
MOVED = 5e-3
VOCABULARY = 320
NEW_TOKENS = 6

# ---- models ----------------------------------------------------------------------------------------------------------

_TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64, "initializer_range": 0.25,
    "eos_token_id": 2, "pad_token_id": 3, "bos_token_id": 1,
}  # fmt: skip
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 16}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": VOCABULARY}
_OPT = {"ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.15}

FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**_TEXT, head_dim=16, tie_word_embeddings=True)),
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_TEXT)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**_TEXT, head_dim=16, final_logit_softcapping=3.0)),
    "gemma3": lambda: hf.Gemma3ForCausalLM(
        hf.Gemma3TextConfig(**_TEXT, head_dim=16, final_logit_softcapping=4.0, sliding_window=8)
    ),
    "granite": lambda: hf.GraniteForCausalLM(hf.GraniteConfig(**_TEXT, logits_scaling=3.0, embedding_multiplier=2.0)),
    "cohere": lambda: hf.CohereForCausalLM(hf.CohereConfig(**_TEXT, logit_scale=0.3)),
    # These two have dropout, which a run switches off.
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**_GPT2, initializer_range=0.15, eos_token_id=2, bos_token_id=1)),
    "opt": lambda: hf.OPTForCausalLM(hf.OPTConfig(**_TEXT, **_OPT)),
    "qwen3_moe": lambda: hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**_TEXT, **_MOE, router_aux_loss_coef=0.1)),
    "mamba": lambda: hf.MambaForCausalLM(
        hf.MambaConfig(vocab_size=VOCABULARY, hidden_size=32, state_size=4, num_hidden_layers=2, initializer_range=0.15)
    ),
}
VISION = ("llava", "qwen2_5_vl", "qwen3_vl")
_ADAPTED = {
    "gpt2": ["c_attn", "c_fc"],
    "opt": ["q_proj", "fc1"],
    "mamba": ["in_proj", "x_proj"],
    "qwen3_moe": ["q_proj", "v_proj"],
}
_TUNERS = {
    "lora": {},
    "lora+head": {"modules_to_save": ["lm_head"]},
    "dora": {"use_dora": True},
}


def make_model(family: str, seed: int, **kwargs: Any) -> nn.Module:
    if family in VISION:
        return tiny_vision.make_vlm(family, seed=seed, **kwargs)
    torch.manual_seed(seed)
    model = FAMILIES[family]()
    with torch.no_grad():
        for parameter in model.parameters():  # biases that start at zero too
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def peft_config(case: Case) -> Any:
    if case.tuner == "full":
        return None
    options = {"modules_to_save": None, "use_dora": False, **_TUNERS[case.tuner]}
    targets = _ADAPTED.get(case.family, ["q_proj", "v_proj", "up_proj"])
    return lora_config(rank=4, alpha=8, dropout=0.0, target_modules=targets, **options)


# ---- cases -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One run. Rows that do not fill the last micro-batch or window of an epoch are what `rows` decides."""

    family: str
    tuner: str = "full"
    ranks: int = 1
    accumulation: int = 1
    rows: int = 7
    batch: int = 2
    loss: dict[str, Any] = field(default_factory=dict)
    """Knobs of the loss, by their names in the config."""
    optim: str = "sgd"
    teacher: str = "qwen3"
    unlabelled: bool = False
    """Every third row has `ce: false`."""
    lmbda: float = 0.0
    seq_kd: bool = False
    visual: dict[str, Any] = field(default_factory=dict)
    """Visual targets: weight and distance of each."""
    teacher_vision: int = 32
    """Width of the teacher's tower: another than the student's 32 wants a projector for `vit`."""
    hidden: dict[str, Any] = field(default_factory=dict)
    """Hidden-state KD: weight, distance and depths. The teacher is then a Qwen3 of three layers."""
    teacher_width: int = 32
    """Of that teacher's hidden states."""
    checkpointing: bool = False
    """Gradient checkpointing."""
    prefix: bool = False
    """The teacher reads three tokens in front of each row."""

    def __str__(self) -> str:
        options = ",".join(f"{k}={v}" for k, v in self.loss.items())
        marks = [self.optim, f"{self.ranks}x{self.accumulation}x{self.batch}", f"{self.rows} rows", options]
        marks += (
            ["unlabelled"] * self.unlabelled + [f"lmbda={self.lmbda}"] * (self.lmbda > 0) + ["seq_kd"] * self.seq_kd
        )
        marks += [f"hidden={self.hidden}"] * bool(self.hidden) + ["checkpointing"] * self.checkpointing
        marks += ["prefix"] * self.prefix
        return " ".join([self.family, self.tuner, *filter(None, marks), *self.visual])


FORWARD, REVERSE, SKEWED = {"beta": 0.0}, {"beta": 1.0}, {"beta": 0.3, "llm_kd_weight": 4.0}
SCALED = {"divergence": "jsd_scaled", "beta": 0.1}
MIXED = {"divergence": "mixed_kl", "beta": 0.3}
SOFT = {"kd_temperature": 2.0, "beta": 0.3, "llm_kd_weight": 8.0}
SHARP = {"kd_temperature": 0.7, "beta": 0.9, "llm_kd_weight": 8.0}
CE, NO_KD = {"sft_alpha": 0.4, "llm_kd_weight": 0.7}, {"llm_kd_weight": 0.0}
ALIGNER = {"aligner": {}}
DEPTHS = {"targets": {"layer": [0.33, 1.0]}}
BOTH = {"aligner": {"weight": 0.5}, "vit": {"distance": "cosine", "weight": 2.0}}

# Family, tuner, ranks, accumulation and rows; 2 rows a batch. Every family meets full training and adapters (a trained
# copy of the head: where it is not tied), one rank and several, whole windows and ragged ends: a short micro-batch, a
# short window, a rank whose last batch is only repeated rows (5 rows on 3 ranks of 1). Every option of the loss meets
# full training and adapters, several ranks and accumulation.
CASES = [
    tiny.slow(Case("qwen3", "full", 1, 1, 7, loss=FORWARD | CE)),
    Case("qwen3", "full", 2, 2, 11, loss=SCALED | CE, optim="adamw", unlabelled=True),
    tiny.slow(Case("qwen3", "full", 3, 1, 14, loss=REVERSE)),
    Case("qwen3", "lora", 1, 3, 7, loss=SOFT | CE, optim="momentum"),
    tiny.slow(Case("qwen3", "lora", 2, 1, 9, loss=MIXED, optim="adamw")),
    Case("qwen3", "dora", 3, 2, 5, batch=1, loss=NO_KD),
    Case("llama", "full", 1, 3, 13, loss=MIXED | CE, optim="momentum", unlabelled=True),
    tiny.slow(Case("llama", "full", 2, 1, 8, loss=NO_KD, unlabelled=True)),
    tiny.slow(Case("llama", "full", 3, 2, 19, loss=SOFT, optim="adamw")),
    Case("llama", "lora", 3, 1, 8, loss=FORWARD),
    tiny.slow(Case("llama", "dora", 1, 2, 6, loss=SCALED)),
    tiny.slow(Case("llama", "lora+head", 1, 1, 5, loss=REVERSE | CE)),
    Case("llama", "lora+head", 2, 3, 9, loss=SKEWED | CE, optim="adamw"),
    tiny.slow(Case("gemma2", "full", 1, 2, 7, loss=REVERSE | CE)),
    Case("gemma2", "full", 2, 1, 6, loss=SHARP),
    tiny.slow(Case("gemma2", "lora", 3, 3, 11, batch=1, loss=SKEWED | CE)),
    tiny.slow(Case("gemma2", "dora", 2, 2, 9, loss=FORWARD, optim="adamw")),
    tiny.slow(Case("gemma3", "full", 1, 3, 8, loss=SOFT | CE, optim="adamw")),
    Case("gemma3", "full", 3, 1, 5, batch=1, loss=MIXED),
    tiny.slow(Case("gemma3", "lora", 2, 2, 9, loss=NO_KD)),
    Case("gemma3", "dora", 1, 1, 4, loss=SHARP, optim="momentum"),
    Case("granite", "full", 1, 1, 3, loss=SCALED | CE, unlabelled=True),
    tiny.slow(Case("granite", "full", 2, 3, 13, loss=SHARP | CE, optim="momentum")),
    tiny.slow(Case("granite", "lora", 1, 2, 7, loss=REVERSE)),
    tiny.slow(Case("granite", "lora+head", 3, 1, 7, loss=MIXED | CE)),
    tiny.slow(Case("cohere", "full", 1, 2, 5, loss=SKEWED)),
    tiny.slow(Case("cohere", "full", 3, 1, 8, loss=NO_KD)),
    Case("cohere", "lora", 2, 3, 9, loss=SCALED, optim="adamw"),
    Case("cohere", "dora", 1, 1, 7, loss=SOFT | CE),
    Case("gpt2", "full", 1, 3, 11, loss=SHARP | CE),
    tiny.slow(Case("gpt2", "full", 2, 1, 5, loss=SKEWED | CE, optim="adamw")),
    Case("gpt2", "lora", 3, 2, 13, loss=SOFT),
    tiny.slow(Case("gpt2", "dora", 2, 1, 7, loss=REVERSE | CE)),
    Case("opt", "full", 1, 1, 7, loss=FORWARD, optim="momentum"),
    tiny.slow(Case("opt", "full", 3, 3, 11, batch=1, loss=SCALED | CE)),
    tiny.slow(Case("opt", "lora", 2, 1, 7, loss=SHARP, unlabelled=True)),
    tiny.slow(Case("qwen3_moe", "full", 1, 2, 7, loss=SKEWED | CE)),
    Case("qwen3_moe", "full", 2, 2, 9, loss=FORWARD),
    tiny.slow(Case("qwen3_moe", "lora", 3, 1, 12, loss=MIXED | CE)),
    tiny.slow(Case("qwen3_moe", "lora+head", 1, 3, 11, loss=NO_KD, optim="adamw")),
    Case("mamba", "full", 1, 2, 5, loss=SCALED | CE),
    tiny.slow(Case("mamba", "full", 2, 1, 5, loss=REVERSE)),
    tiny.slow(Case("mamba", "lora", 3, 1, 7, loss=FORWARD | CE)),
    # Images in three rows of four.
    tiny.slow(Case("llava", "full", 1, 2, 7, loss=CE, visual=BOTH)),
    tiny.slow(Case("llava", "full", 2, 1, 7, loss=NO_KD, visual=ALIGNER)),
    tiny.slow(Case("llava", "full", 3, 1, 4, batch=1, loss=FORWARD, visual=ALIGNER, optim="adamw")),
    Case("llava", "full", 2, 2, 5, batch=1, loss=CE, visual=BOTH, teacher_vision=48),
    Case("qwen2_5_vl", "full", 1, 1, 5, loss=NO_KD, visual=BOTH, optim="adamw"),
    tiny.slow(Case("qwen2_5_vl", "full", 2, 2, 9, loss=SHARP | CE, visual=ALIGNER)),
    Case("qwen3_vl", "full", 1, 3, 7, loss=REVERSE | CE, visual=BOTH | {"deepstack": {}}),
    tiny.slow(Case("qwen3_vl", "lora", 2, 1, 6, loss=MIXED | CE)),
    # Answers that a model wrote: no cross-entropy on the student's own, and D counts what was written.
    tiny.slow(Case("qwen3", "full", 1, 2, 7, loss=SKEWED | CE, lmbda=1.0)),
    Case("llama", "full", 2, 2, 9, loss=FORWARD | CE, lmbda=0.5),
    tiny.slow(Case("gpt2", "lora", 1, 3, 5, loss=REVERSE | CE, lmbda=0.5, optim="adamw")),
    Case("gemma2", "full", 3, 1, 5, batch=1, loss=MIXED | CE, lmbda=1.0),
    Case("llama", "full", 1, 1, 5, loss=SOFT | CE, seq_kd=True, unlabelled=True),
    Case("qwen3", "lora", 2, 1, 5, loss=SCALED | CE, seq_kd=True, lmbda=0.5),
    Case("qwen3_moe", "full", 1, 2, 5, loss=FORWARD | CE, lmbda=0.5),
    # Hidden states: equal widths and others, both distances, alone and beside the divergence.
    Case("qwen3", "full", 1, 2, 7, loss=CE, hidden=DEPTHS, checkpointing=True),
    Case("llama", "full", 2, 2, 9, batch=1, loss=CE, hidden=DEPTHS | {"weight": 0.5}, teacher_width=48, prefix=True),
    tiny.slow(Case("qwen3", "lora", 2, 1, 8, loss=NO_KD, hidden=DEPTHS, teacher_width=48, optim="adamw")),
    Case("gpt2", "full", 1, 1, 5, loss=NO_KD, hidden=DEPTHS | {"distance": "cosine"}, teacher_width=48),
    tiny.slow(Case("gpt2", "full", 3, 1, 4, loss=FORWARD, hidden=DEPTHS | {"distance": "cosine"}, unlabelled=True)),
    tiny.slow(Case("mamba", "full", 2, 3, 5, loss=NO_KD, hidden=DEPTHS, teacher_width=48, checkpointing=True)),
    Case("llama", "full", 2, 1, 5, loss=CE, hidden=DEPTHS, teacher_width=48, lmbda=0.5, checkpointing=True),
    Case("qwen3_vl", "full", 2, 1, 6, loss=CE, hidden={"targets": {"layer": [0.5, 1.0]}}, visual=ALIGNER),
]  # fmt: skip


# ---- rows ------------------------------------------------------------------------------------------------------------


def make_rows(case: Case) -> list[Row]:
    """Rows of several lengths: prompt, answer, and in some a second prompt and answer."""
    generator = torch.Generator().manual_seed(5)
    rows = []
    for i in range(case.rows):
        length = 5 + (i * 5) % 8
        ids = torch.randint(4, 290, (length,), generator=generator).tolist()
        labels = [-100] * 3 + ids[3:]
        if i % 3 == 1 and not (case.lmbda or case.seq_kd):
            labels[5:7] = [-100] * len(labels[5:7])
        row: Row = {"input_ids": ids, "labels": labels, "prompt_length": 3}
        if case.unlabelled and i % 3 == 0:
            row["ce"] = False
        if case.family in VISION and i % 4 != 2:
            row = with_image(row, case.family, i)
        rows.append(row)
    return rows


def with_image(row: Row, family: str, seed: int) -> Row:
    """An image in front of a row, as the family's processor would put it there."""
    model = _shape_of(family)
    made = tiny_vision.make_inputs(model, images=1, seed=seed)
    prefix = made["input_ids"][0, :-3].tolist()
    ids = prefix + row["input_ids"]
    inputs = {k: v for k, v in made.items() if k.startswith(("pixel_values", "image_grid"))}
    if "mm_token_type_ids" in made:
        inputs["mm_token_type_ids"] = torch.tensor([[int(i == tiny_vision.IMAGE) for i in ids]])
    return row | {
        "input_ids": ids, "labels": [-100] * len(prefix) + row["labels"],
        "prompt_length": len(prefix) + row["prompt_length"], "inputs": inputs,
    }  # fmt: skip


PREFIX = (7, 9, 11)


def collate_prefix(rows: Sequence[Row]) -> dict[str, Any]:
    """A batch whose teacher reads `PREFIX` in front of each row."""
    batch = collate_images(rows)
    added = torch.tensor([PREFIX] * len(rows))
    batch["teacher_inputs"] = {
        "input_ids": torch.cat([added, batch["input_ids"]], 1),
        "attention_mask": torch.cat([torch.ones_like(added), batch["attention_mask"]], 1),
        "labels": torch.cat([torch.full_like(added, -100), batch["labels"]], 1),
    }
    return batch


@functools.cache
def _shape_of(family: str) -> nn.Module:
    return tiny_vision.make_vlm(family)


def collate_images(rows: Sequence[Row]) -> dict[str, Any]:
    """A batch with images as a user's own collator gives it: a dict, right-padded."""
    width = max(len(row["input_ids"]) for row in rows)
    batch: dict[str, Any] = {
        "input_ids": torch.tensor([row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in rows]),
        "labels": torch.tensor([row["labels"] + [-100] * (width - len(row["labels"])) for row in rows]),
        "attention_mask": torch.tensor(
            [[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows]
        ),
    }
    names = sorted({name for row in rows for name in row.get("inputs", {})})
    for name in names:
        parts = [row["inputs"].get(name) if "inputs" in row else None for row in rows]
        if name == "mm_token_type_ids":
            batch[name] = (batch["input_ids"] == tiny_vision.IMAGE).long()
            continue
        batch[name] = torch.cat([part for part in parts if part is not None])
        batch.setdefault("visual_sizes", {})[name] = [0 if part is None else len(part) for part in parts]
    return batch


def windows_of(case: Case, rows: list[Row]) -> list[list[list[list[int]]]]:
    """Row numbers by window, rank and micro-batch: ranks take batches in turn; epochs follow each other."""
    batches = [list(range(i, min(i + case.batch, len(rows)))) for i in range(0, len(rows), case.batch)]
    turns = [batches[i : i + case.ranks] for i in range(0, len(batches), case.ranks)]
    epoch = [turns[i : i + case.accumulation] for i in range(0, len(turns), case.accumulation)]
    windows = [epoch[i % len(epoch)] for i in range(STEPS)]
    return [[[turn[r] for turn in w if r < len(turn)] for r in range(case.ranks)] for w in windows]


# ---- the product -----------------------------------------------------------------------------------------------------


def train_case(case: Case, folder: Path) -> dict[str, Any]:
    """Train with kdtrain; initial and final weights, and the answers that were generated."""
    student, teacher = models_of(case)
    knobs = dict(case.loss)
    if case.visual:
        knobs["visual_kd"] = {"enabled": True, "weight": 0.5, "targets": case.visual}
    if case.hidden:
        knobs["hidden_kd"] = case.hidden
    optim: dict[str, Any] = {
        "sgd": {"optim": "sgd", "learning_rate": 0.3, "lr_scheduler_type": "constant"},
        "momentum": {
            "optim": "sgd",
            "optim_args": "momentum=0.8",
            "learning_rate": 0.1,
            "lr_scheduler_type": "linear",
        },
        "adamw": {"optim": "adamw_torch", "adam_epsilon": 1e-2, "learning_rate": 0.02, "lr_scheduler_type": "linear"},
    }[case.optim]
    args = make_args(
        folder, **optim, **knobs, max_steps=STEPS, per_device_train_batch_size=case.batch,
        gradient_accumulation_steps=case.accumulation, train_sampling_strategy="sequential", lmbda=case.lmbda,
        seq_kd=case.seq_kd, max_new_tokens=NEW_TOKENS, weight_decay=weight_decay(case), logging_steps=STEPS,
        gradient_checkpointing=case.checkpointing,
    )  # fmt: skip
    torch.manual_seed(11)  # of adapters
    trainer = GKDTrainerWithMetrics(
        student, teacher if case.loss.get("llm_kd_weight") != 0 or case.visual or case.hidden else None, args,
        train_dataset=make_rows(case), processing_class=_tokenizer(), peft_config=peft_config(case),
        data_collator=collate_images if case.family in VISION else collate_prefix if case.prefix else None,
    )  # fmt: skip
    start = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    projectors = [p.detach().clone() for p in trainer._projectors()]
    seen = remember_windows(trainer)
    trainer.train()
    assert trainer.state.global_step == STEPS
    trained = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trained |= {f"projector {i}": p.detach().clone() for i, p in enumerate(trainer._projectors())}
    return {"start": start, "trained": trained, "seen": seen, "projectors": projectors}


def remember_windows(trainer: Any) -> list[Any]:
    """Filled in training: by window and micro-batch, who wrote the answers, and the tokens of rows that are new."""
    seen: list[Any] = []
    collect = trainer.get_batch_samples

    def remember(*args: Any) -> Any:
        batches, items = collect(*args)
        seen.append([(batch.generated_by, [] if batch.all_repeated else tokens_of(batch)) for batch in batches])
        return batches, items

    trainer.get_batch_samples = remember
    return seen


def tokens_of(batch: Batch) -> list[list[int]]:
    rows = zip(batch.model_inputs["input_ids"], batch.model_inputs["attention_mask"].bool(), strict=True)
    return [ids[mask].tolist() for ids, mask in rows]


@functools.cache
def _tokenizer() -> Any:
    return tiny.make_tokenizer()


def models_of(case: Case) -> tuple[nn.Module, nn.Module]:
    if case.family in VISION:
        return make_model(case.family, 1), make_model(case.family, 2, vision=case.teacher_vision)
    if case.hidden:
        torch.manual_seed(2)
        config = _TEXT | {"hidden_size": case.teacher_width, "num_hidden_layers": 3}
        return make_model(case.family, 1), hf.Qwen3ForCausalLM(hf.Qwen3Config(**config, head_dim=16))
    return make_model(case.family, 1), make_model(case.teacher, 2)


def weight_decay(case: Case) -> float:
    """Only in models whose vectors are all biases and norms, which is what the oracle does not decay."""
    return (
        0.1 if case.optim == "adamw" and case.family in ("qwen3", "llama", "granite") and case.tuner != "dora" else 0.0
    )


def save_cases(cases: Sequence[Case], folder: Path) -> None:
    """In one rank: every case of a group after the other, each with its result or its error in a file."""
    rank = os.environ["RANK"]
    for i, case in enumerate(cases):
        try:
            result = train_case(case, folder / "run")
        except Exception:
            result = {"error": traceback.format_exc()}
        torch.save(result, folder / f"{i}-{rank}.pt")


@pytest.fixture(scope="module")
def results(request, tmp_path_factory) -> Callable[[Case], list[dict[str, Any]]]:
    """What every rank of a case's run has. Cases of several ranks run together: starting processes takes longer."""

    items = (item for item in request.session.items if item.path == request.path)
    cases = [item.callspec.params["case"] for item in items]  # that are asked for

    def of_ranks(ranks: int) -> list[Case]:
        return [case for case in cases if case.ranks == ranks]

    @functools.cache
    def group(ranks: int) -> Path:
        folder = tmp_path_factory.mktemp(f"ranks{ranks}")
        tiny.run_ranks(save_cases, ranks, of_ranks(ranks), folder, timeout=240)
        return folder

    def of(case: Case) -> list[dict[str, Any]]:
        if case.ranks == 1:
            return [train_case(case, tmp_path_factory.mktemp("run"))]
        number = of_ranks(case.ranks).index(case)
        return [torch.load(group(case.ranks) / f"{number}-{r}.pt", weights_only=False) for r in range(case.ranks)]

    return of


# ---- the comparison --------------------------------------------------------------------------------------------------


def oracle_of(case: Case, start: dict[str, Any]) -> Oracle:
    student, teacher = models_of(case)
    if case.tuner != "full":
        from peft import get_peft_model

        student = get_peft_model(student, peft_config(case))
        student.load_state_dict(start["start"])  # the adapters' first weights are random
    projectors = [nn.Parameter(p.double()) for p in start["projectors"]]
    kd = case.loss.get("llm_kd_weight", 1.0)
    loss = Loss(
        kd=kd,
        ce=case.loss.get("sft_alpha", 0.0) if kd else 1.0,
        beta=case.loss.get("beta", 0.5),
        divergence=case.loss.get("divergence", "jsd"),
        temperature=case.loss.get("kd_temperature", 1.0),
        aux=0.1 if case.family == "qwen3_moe" else 0.0,
        features=functools.partial(feature_loss, case, projectors) if case.visual or case.hidden else None,
        prefix=PREFIX if case.prefix else (),
    )
    optimizer = {
        "sgd": Optimizer([0.3] * STEPS),
        "momentum": Optimizer([0.1 * (1 - i / STEPS) for i in range(STEPS)], momentum=0.8),
        "adamw": Optimizer([0.02 * (1 - i / STEPS) for i in range(STEPS)], "adamw", weight_decay=weight_decay(case)),
    }[case.optim]
    return Oracle(double(student), double(teacher), loss, optimizer, projectors)


def feature_loss(
    case: Case, projectors: Sequence[nn.Parameter], student: nn.Module, teacher: nn.Module, rows: Sequence[Row]
) -> torch.Tensor:
    total = visual_loss(case, projectors, student, teacher, rows)
    return total + hidden_loss(case, projectors, student, teacher, rows) if case.hidden else total


def hidden_loss(
    case: Case, projectors: Sequence[nn.Parameter], student: nn.Module, teacher: nn.Module, rows: Sequence[Row]
) -> torch.Tensor:
    """weight / (depths · D) · Σ of the distances at the supervised positions of all rows, token by token."""
    depths = case.hidden["targets"]["layer"]
    supervised = sum(1 for row in rows for label in row["labels"][1:] if label != -100)
    total = torch.zeros((), dtype=torch.float64)
    for row in rows:
        ours = layer_outputs(student, row, ())
        with torch.no_grad():
            theirs = layer_outputs(teacher, row, PREFIX if case.prefix else ())
        shift = len(PREFIX) if case.prefix else 0
        for i, depth in enumerate(depths):
            s_TH, t_TH = (layers[max(int(depth * len(layers) + 0.5), 1) - 1] for layers in (ours, theirs))
            for position in (t for t in range(len(row["labels"]) - 1) if row["labels"][t + 1] != -100):
                s, t = s_TH[position], t_TH[position + shift]
                if s.shape != t.shape:
                    s = projectors[2 * i] @ s + projectors[2 * i + 1]
                cosine = case.hidden.get("distance") == "cosine"
                distance = 1 - (s @ t) / (s.norm() * t.norm()) if cosine else ((s - t) ** 2).sum() / len(t)
                total = total + case.hidden.get("weight", 1.0) / len(depths) * distance / supervised
    return total


def layer_outputs(model: nn.Module, row: Row, prefix: Sequence[int]) -> list[torch.Tensor]:
    """What goes into each layer but the first, and into the norm behind the last one; [T, H] each."""
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in row.get("inputs", {}).items()}
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    decoder = getattr(inner, "backbone", None) or inner.get_decoder()
    layers = decoder.h if hasattr(decoder, "h") else decoder.layers
    norm = next(getattr(decoder, name) for name in ("norm", "norm_f", "ln_f") if hasattr(decoder, name))
    found: list[torch.Tensor] = []
    hooks = [
        module.register_forward_pre_hook(
            lambda _, args, kwargs: found.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
        for module in (*layers[1:], norm)
    ]
    model(input_ids=torch.tensor([[*prefix, *row["input_ids"]]]), **inputs, use_cache=False)
    for hook in hooks:
        hook.remove()
    assert len(found) == len(layers)
    return [one[0] for one in found]


def visual_loss(
    case: Case, projectors: Sequence[nn.Parameter], student: nn.Module, teacher: nn.Module, rows: Sequence[Row]
) -> torch.Tensor:
    """0.5 · Σ weight · distance; a distance is a mean over all features of the window's images, then over levels."""
    total = torch.zeros((), dtype=torch.float64)
    for target, options in case.visual.items():
        by_level: dict[int, list[torch.Tensor]] = {}
        for row in (row for row in rows if "inputs" in row):
            inputs = {k: v.double() if v.is_floating_point() else v for k, v in row["inputs"].items()}
            ours = tiny_vision.reference_features(student, inputs)[target]
            with torch.no_grad():
                theirs = tiny_vision.reference_features(teacher, inputs)[target]
            for level, features in enumerate(zip(ours, theirs, strict=True)):
                s, t = (x if torch.is_tensor(x) else torch.cat(list(x)) for x in features)
                if s.shape != t.shape:
                    weight, bias = projectors
                    s = s @ weight.T + bias
                cosine = options.get("distance") == "cosine"
                distance = 1 - nn.functional.cosine_similarity(s, t, dim=-1) if cosine else (s - t).square()
                by_level.setdefault(level, []).append(distance.flatten())
        if by_level:
            levels = torch.stack([torch.cat(parts).mean() for parts in by_level.values()])
            total = total + 0.5 * options.get("weight", 1.0) * levels.mean()
    return total


def windows_as_trained(case: Case, ranks: Sequence[dict[str, Any]]) -> list[Window]:
    """The oracle's own windows, with the answers that a model wrote in place of the data's.

    A window that is generated may have its rows in other micro-batches of the same rank: they are told by their prompt.
    """
    rows = make_rows(case)
    windows = []
    for step, by_rank in enumerate(windows_of(case, rows)):
        micro_batches = []
        writers = {writer for rank in ranks for writer, tokens in rank["seen"][step] if tokens}
        assert len(writers) == 1, "ranks drew differently"
        (writer,) = writers
        for rank, batches in enumerate(by_rank):
            expected = [n for numbers in batches for n in numbers]
            for _, tokens in ranks[rank]["seen"][step]:
                numbers = [place(expected, rows, ids, writer is not None) for ids in tokens]
                if tokens:
                    pairs = zip(numbers, tokens, strict=True)
                    micro_batches.append([answered(rows[n], ids, writer is not None) for n, ids in pairs])
            assert not expected, f"rows {expected} of the window were not trained on"
        windows.append(Window(micro_batches, writer == "student"))
    return windows


def place(left: list[int], rows: Sequence[Row], ids: Sequence[int], generated: bool) -> int:
    """Take the row that is trained on out of those that are left: the next one, or of generated ones that which was
    asked."""
    if not generated:
        return left.pop(0)
    found = [n for n in left if ids[: rows[n]["prompt_length"]] == rows[n]["input_ids"][: rows[n]["prompt_length"]]]
    assert found, "a prompt that is not of the window's rows"
    longest = max(found, key=lambda n: rows[n]["prompt_length"])  # one prompt may begin as another does
    left.remove(longest)
    return longest


def answered(row: Row, ids: list[int], generated: bool) -> Row:
    if not generated:
        assert ids == row["input_ids"], "trained on other tokens than the row's"
        return row
    start = row["prompt_length"]
    assert ids[:start] == row["input_ids"][:start], "another prompt than the row's"
    assert len(ids) == start + NEW_TOKENS or ids[-1] == _TEXT["eos_token_id"], "an answer without its end"
    fresh = row | {"input_ids": ids, "labels": [-100] * start + ids[start:]}
    if "mm_token_type_ids" in row.get("inputs", {}):
        kinds = torch.tensor([[int(i == tiny_vision.IMAGE) for i in ids]])
        fresh["inputs"] = row["inputs"] | {"mm_token_type_ids": kinds}
    return fresh


@pytest.mark.parametrize("case", CASES, ids=str)
def test_weights_equal_those_of_a_float64_loop(case, results):
    ranks = results(case)
    for rank in ranks:
        assert "error" not in rank, rank["error"]
    oracle = oracle_of(case, ranks[0])
    oracle.train(windows_as_trained(case, ranks))
    expected = {name: p.detach() for name, p in oracle.student.named_parameters() if p.requires_grad}
    moved = max(float((value - ranks[0]["start"][name]).abs().max()) for name, value in expected.items())
    assert moved > MOVED
    expected |= {f"projector {i}": p.detach() for i, p in enumerate(oracle.extra)}
    for rank in ranks:
        assert rank["trained"].keys() == expected.keys()
        errors = {name: float((rank["trained"][name] - value).abs().max()) for name, value in expected.items()}
        worst = max(errors, key=errors.__getitem__)
        assert errors[worst] < BOUND, f"{worst} is off by {errors[worst]:.1e}, of {moved:.1e} that weights moved"

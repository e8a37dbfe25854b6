"""Rows behind each other in a forward: the loss and the gradient are those of padded batches, whatever lies where."""

import dataclasses
import itertools
import random

import pytest
import torch
from datasets import Dataset
from transformers import masking_utils
from trl.experimental.gkd import GKDConfig

from kdtrain.data import Collator
from kdtrain.data.packing import Dealing, Layout, best_fit, in_lines, split_up
from kdtrain.errors import DataError, PreflightError
from kdtrain.models.known_masks import mask_known
from kdtrain.models.probe import TextLook
from kdtrain.preflight.model_checks import CheckedModel
from kdtrain.preflight.packing import packing_findings, why_documents_mix
from kdtrain.teachers import CachedTeacher, LocalTeacher, SelfTeacher, ServedTeacher, Targets, Teacher
from kdtrain.teachers.cached.store import Format
from kdtrain.teachers.served.http import Servers
from kdtrain.trainer import GKDTrainerWithMetrics
from tests import tiny
from tests.stub_server import StubServer
from tests.test_trainer_served import Begin
from tests.tiny_cache import write_cache
from tests.tiny_families import make
from tests.tiny_vision import make_vlm

NONE = {}
PADDING_FREE = {"padding_free": True}
PACKING = {"packing": True}
TOKENS = {"per_device_train_tokens": 48}
WAYS = {
    "padding-free": PADDING_FREE,
    "packing": PACKING,
    "tokens": TOKENS,
    "padding-free, tokens": {**PADDING_FREE, **TOKENS},
    "packing, tokens": {**PACKING, **TOKENS},
}


def skewed_rows(count=20, longest=40, seed=0):
    """Tokenised rows of very different lengths; some supervise nothing, and one its very first token."""
    draw = random.Random(seed)
    rows = []
    for i in range(count):
        length = longest if i % 7 == 3 else draw.randint(2, 9)
        ids = [draw.randrange(4, 300) for _ in range(length)]
        labels = ids if i == 5 else [-100] * (length // 2) + ids[length // 2 :]
        rows.append({"input_ids": ids, "labels": [-100] * length if i == 6 else labels, "row_id": f"row-{i}"})
        rows[-1]["ce"] = i % 4 != 1
        rows[-1]["prompt_length"] = max(length // 2, 1)
    return Dataset.from_list(rows)


def args(folder, **options):
    own = {"llm_kd_weight": 0.7, "sft_alpha": 0.3, "disable_dropout": True}
    own |= {name: options.pop(name) for name in list(options) if name not in GKDConfig.__dataclass_fields__}
    config = GKDConfig(
        **{
            "output_dir": str(folder), "report_to": "none", "use_cpu": True, "bf16": False, "max_length": 40,
            "gradient_checkpointing": False, "learning_rate": 1e-2, "optim": "sgd", "logging_steps": 1, "max_steps": 2,
            "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "lmbda": 0.0, "save_strategy": "no",
            "max_grad_norm": 1e9, "lr_scheduler_type": "constant", "disable_tqdm": True, **options,
        }
    )  # fmt: skip
    for name, value in own.items():
        setattr(config, name, value)
    return config


def trained(folder, student, teacher=None, rows=None, tokenizer=None, extra=None, **options):
    """The records of a run, and how far its weights came."""
    extra = {"train_dataset": skewed_rows() if rows is None else rows, **(extra or {})}
    trainer = GKDTrainerWithMetrics(
        student, teacher, args(folder, **options), processing_class=tokenizer or tiny.make_tokenizer(), **extra
    )
    before = [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad]
    trainer.train()
    after = [p.detach() for p in trainer.model.parameters() if p.requires_grad]
    moved = torch.cat([(b - a).flatten() for a, b in zip(before, after, strict=True)])
    return [record for record in trainer.state.log_history if "loss" in record], moved


SAME = ("loss", "grad_norm", "llm_kd_loss", "sft_loss", "token_accuracy", "teacher_agreement", "student_entropy")


def assert_same(one, other):
    (records, moved), (others, moved_too) = one, other
    assert len(records) == len(others)
    for record, same in zip(records, others, strict=True):
        for name in SAME:
            assert (name in record) == (name in same)
            if name in record:
                assert same[name] == pytest.approx(record[name], rel=1e-5, abs=1e-7), name
    assert float((moved - moved_too).norm() / moved.norm()) < 5e-5  # differences of rounded weights


FAMILIES = {
    "qwen3": lambda seed: tiny.make_qwen3(seed=seed),
    "llama": lambda seed: tiny.make_llama(seed=seed),
    "gemma3": lambda seed: make("gemma3", seed),  # a sliding window of 8, in rows of 40
    "gemma2": lambda seed: tiny.make_gemma2(seed=seed),  # soft-capped logits
    "gpt2": lambda seed: make("gpt2", seed),  # a table of 64 positions, in lines of more
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", tiny.first_quick(FAMILIES))
def test_loss_gradient_and_steps_are_those_of_padded_batches(tmp_path, tokenizer, family, way):
    make_one = FAMILIES[family]
    padded = trained(tmp_path / "a", make_one(1), make_one(2), tokenizer=tokenizer)
    other = trained(tmp_path / "b", make_one(1), make_one(2), tokenizer=tokenizer, **WAYS[way])
    assert_same(padded, other)
    assert all(
        len(records) == 2 and record["loss"] > 0.1 and record["grad_norm"] > 0.01
        for records, _ in (padded, other)
        for record in records
    )
    assert other[0][0]["padding_fraction"] < padded[0][0]["padding_fraction"]


def with_teacher_view(rows):
    """Rows that the teacher reads behind a prefix of its own: other tokens, other lengths, the same answers."""

    def seen(row, i):
        prefix = [7 + i % 5] * (1 + i % 6)
        return {
            "labels": [-100, *row["labels"][1:]],
            "teacher_input_ids": prefix + row["input_ids"],
            "teacher_labels": [-100] * (len(prefix) + 1) + row["labels"][1:],
            "teacher_prompt_length": len(prefix) + row["prompt_length"],
        }

    return rows.map(seen, with_indices=True)


class Logits(Teacher):
    """A teacher that gives logits, for which the student's are made in full."""

    def __init__(self, model):
        self.model, self.vocab_size = model.eval(), model.config.vocab_size

    def targets(self, batch):
        with torch.no_grad():
            return Targets(self.model(**batch.model_inputs).logits[:, :-1][batch.predicts_BT])


def lora():
    return {"peft_config": tiny.lora_config(rank=4, alpha=8, dropout=0.0, target_modules="all-linear")}


def cached(folder, lookahead=2):
    teacher, collator = LocalTeacher(tiny.make_qwen3(seed=2)), Collator(tiny.make_tokenizer(), row_keys=True)
    form = Format("topk", 320, entries=320, exact=True)
    return CachedTeacher(write_cache(folder / "cache", teacher, skewed_rows(), collator, form), lookahead=lookahead)


CASES = {
    "cross-entropy alone": lambda: ({}, {"llm_kd_weight": 0.0}, None),
    "LoRA": lambda: (lora(), {}, tiny.make_qwen3(seed=2)),
    "logits": lambda: ({"teacher": Logits(tiny.make_qwen3(seed=2))}, {}, None),
    "the student's answers": lambda: ({}, {"lmbda": 1.0, "max_new_tokens": 6}, tiny.make_qwen3(seed=2)),
    "the best of two": lambda: (
        {}, {"lmbda": 1.0, "max_new_tokens": 6, "samples_per_prompt": 2, "select": "best"}, tiny.make_qwen3(seed=2)
    ),
    "two weighted": lambda: (
        {}, {"lmbda": 1.0, "max_new_tokens": 6, "samples_per_prompt": 2, "select": "weighted"}, tiny.make_qwen3(seed=2)
    ),
    "the teacher's answers": lambda: ({}, {"seq_kd": True, "max_new_tokens": 6}, tiny.make_qwen3(seed=2)),
    "itself with a prefix": lambda: (
        {**lora(), "teacher": SelfTeacher(), "train_dataset": with_teacher_view(skewed_rows())}, {}, None
    ),
    "a teacher with a prefix": lambda: (
        {"train_dataset": with_teacher_view(skewed_rows())}, {"lmbda": 0.5, "max_new_tokens": 6},
        tiny.make_qwen3(seed=2),
    ),
}  # fmt: skip


@pytest.mark.parametrize("way", [pytest.param("padding-free", marks=pytest.mark.slow), "packing", tiny.slow("tokens")])
@pytest.mark.parametrize("case", CASES)
def test_so_are_those_of_every_kind_of_answer_and_teacher(tmp_path, tokenizer, case, way):
    runs = []
    for options in (NONE, WAYS[way]):
        extra, more, teacher = CASES[case]()
        student = tiny.make_qwen3(seed=1)
        runs.append(trained(tmp_path, student, teacher, tokenizer=tokenizer, extra=extra, **more, **options))
    assert_same(*runs)


@pytest.mark.parametrize("way", ["packing", tiny.slow("padding-free"), tiny.slow("packing, tokens")])
def test_stored_targets_are_those_of_the_rows_wherever_they_lie(tmp_path, tokenizer, way):
    """Read two windows ahead, while the rows come to lie among others."""
    runs = []
    for name, options in (("padded", NONE), (way, WAYS[way])):
        teacher = cached(tmp_path / name)
        runs.append(trained(tmp_path, tiny.make_qwen3(seed=1), None, tokenizer=tokenizer, max_steps=4,
                            extra={"teacher": teacher}, **options))  # fmt: skip
        teacher.close()
    assert_same(*runs)
    assert_same(runs[0], trained(tmp_path, tiny.make_qwen3(seed=1), tiny.make_qwen3(seed=2), max_steps=4,
                                 tokenizer=tokenizer))  # fmt: skip


@pytest.mark.parametrize("lookahead", [2, tiny.slow(0)])
def test_a_server_is_asked_once_about_each_row_and_its_answers_find_their_rows(tmp_path, tokenizer, lookahead):
    runs, asked = [], []
    with StubServer(tiny.make_qwen3(seed=2)) as server:
        for options in (NONE, PACKING):
            servers = Servers([server.url], timeout_s=30.0, max_retries=0)
            teacher = ServedTeacher(
                servers, model="teacher", vocab_size=320, top_k=320, route="prompt_logprobs", lookahead=lookahead
            )
            extra = {"teacher": teacher, "callbacks": [Begin(server)]}
            runs.append(trained(tmp_path, tiny.make_qwen3(seed=1), None, tokenizer=tokenizer, extra=extra, **options))
            asked.append(sorted(tuple(ids) for request in server.requests for ids in request.body["prompt"]))
            teacher.close()
    assert_same(*runs)
    assert asked[0] == asked[1]


@pytest.mark.parametrize("way", ["padding-free", tiny.slow("packing"), tiny.slow("tokens")])
def test_two_ranks_give_the_numbers_of_one(tmp_path, way):
    """The rows of an epoch leave the last window with a rank that has none, and ranks need other numbers of lines."""
    (alone,) = tiny.run_ranks(on_ranks, 1, str(tmp_path / "one"), 2, NONE)
    for records in tiny.run_ranks(on_ranks, 2, str(tmp_path / "two"), 1, WAYS[way])[:1]:
        assert [len(records), len(alone)] == [6, 6]
        for record, same in zip(records, alone, strict=True):
            assert record == pytest.approx(same, rel=2e-5, abs=1e-6)


def on_ranks(folder, size, options):
    """Six steps over two epochs, on one rank or more."""
    own = {"ddp_backend": "gloo", "per_device_train_batch_size": 2 * size, "max_steps": 6, **options}
    own |= {"gradient_accumulation_steps": 2}
    rows = skewed_rows(18)
    records, _ = trained(folder, tiny.make_qwen3(seed=1), tiny.make_qwen3(seed=2), rows, **own)
    return [[record[name] for name in ("loss", "grad_norm", "llm_kd_loss")] for record in records]


def test_the_load_balancing_of_experts_leaves_out_the_padding_of_lines(tmp_path, tokenizer):
    """It is a mean over forwards: with the same rows in each, padded or in a line, it is the same."""
    options = {"gradient_accumulation_steps": 1, "pad_to_multiple_of": 16, "router_aux_loss_coef": 0.5}
    students = (make("qwen3_moe", 1), make("qwen3_moe", 1))
    for student in students:
        student.config.output_router_logits = True
    runs = [
        trained(tmp_path, student, make("qwen3_moe", 2), tokenizer=tokenizer, **way, **options)
        for student, way in zip(students, (NONE, PADDING_FREE), strict=True)
    ]
    assert_same(*runs)
    assert [r["aux_loss"] for r in runs[1][0]] == pytest.approx([r["aux_loss"] for r in runs[0][0]], rel=1e-5)
    assert runs[0][0][0]["aux_loss"] > 0.1


# ---- lines -----------------------------------------------------------------------------------------------------------


def test_a_line_has_documents_with_positions_of_their_own_and_no_mask():
    ids = torch.tensor([[11, 12, 13, 3], [21, 3, 3, 3], [31, 32, 33, 34]])
    predicts = torch.tensor([[True, True, False], [False] * 3, [False, True, True]])
    seen = in_lines({"input_ids": ids}, predicts, Layout(((2, 1), (0,)), (3, 1, 4)), flat=False)
    assert seen.model_inputs["input_ids"].tolist() == [[31, 32, 33, 34, 21], [11, 12, 13, 0, 0]]
    assert seen.model_inputs["position_ids"].tolist() == [[0, 1, 2, 3, 0], [0, 1, 2, 0, 0]]
    assert seen.mask.tolist() == [[1] * 5, [1, 1, 1, 0, 0]]
    assert "attention_mask" not in seen.model_inputs
    assert not seen.one_each
    assert seen.before_S.tolist() == [5, 6, 1, 2]  # in the order of the rows, which the labels have
    flat = in_lines({"input_ids": ids}, predicts, Layout(((2, 1), (0,)), (3, 1, 4)), flat=True)
    assert flat.model_inputs["position_ids"].tolist() == [[0, 1, 2, 3, 0, 0, 1, 2]]
    assert flat.before_S.tolist() == [5, 6, 1, 2]


def test_lines_of_one_row_without_padding_need_no_mask():
    ids = torch.arange(1, 9).reshape(2, 4)
    predicts = torch.ones(2, 3, dtype=torch.bool)
    for lengths, one_each in (((4, 4), True), ((4, 3), False)):
        seen = in_lines({"input_ids": ids}, predicts, Layout(((0,), (1,)), lengths), flat=False)
        assert seen.one_each == one_each
        with mask_known(seen):
            found = masking_utils.find_packed_sequence_indices(seen.model_inputs["position_ids"])
        assert (found is None) == one_each
    seen = in_lines({"input_ids": ids}, predicts, Layout(((0, 1),), (4, 4)), flat=False)
    with mask_known(seen):
        found = masking_utils.find_packed_sequence_indices(seen.model_inputs["position_ids"])
    assert found.unique(dim=-1).tolist() == [[0, 1]]


def test_every_row_is_in_one_line_and_lines_are_no_longer_than_there_is_room():
    draw = random.Random(0)
    for _ in range(50):
        lengths = [draw.randint(1, 70) for _ in range(draw.randint(1, 40))]
        lines = best_fit(lengths, 64)
        assert sorted(itertools.chain(*lines)) == list(range(len(lengths)))
        sums = [sum(lengths[row] for row in line) for line in lines]
        assert all(size <= 64 or len(line) == 1 for size, line in zip(sums, lines, strict=True))
        assert sum(size <= 32 for size in sums) <= 1  # two such lines would have been one
        for dealing in (Dealing(2, 64), Dealing(2, 64, 100), Dealing(2, None, 100), Dealing(2, None, 100, joined=True)):
            forwards = dealing.forwards(lengths)
            more = split_up(forwards, len(forwards) + 3)
            assert len(more) == min(len(forwards) + 3, len(lengths))
            for found in (forwards, more):
                assert sorted(row for lines in found for line in lines for row in line) == list(range(len(lengths)))
                for lines in found:
                    sizes = [sum(lengths[row] for row in line) for line in lines]
                    positions, rows = len(sizes) * max(sizes), sum(map(len, lines))
                    assert positions <= 100 or rows == 1 or len(lines) == 1 or dealing.tokens is None
                    assert len(lines) <= 2 or dealing.tokens is not None


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "llama4", "qwen3_moe"])
def test_models_whose_masks_follow_the_positions_keep_rows_apart(family):
    assert why_documents_mix(make(family)) is None


@pytest.mark.parametrize("family", ["opt", "bloom", "mamba2", "lfm2", "qwen3_next"])
def test_a_model_that_lets_rows_of_a_line_see_each_other_is_refused(tmp_path, tokenizer, family):
    with pytest.raises(PreflightError, match="does not keep rows of one line apart with"):
        trained(tmp_path, make(family), None, tokenizer=tokenizer, llm_kd_weight=0.0, **PACKING)


def test_a_model_that_reads_images_is_refused_before_anything_is_trained():
    side = CheckedModel("student", make_vlm("llava"), TextLook())
    (finding,) = packing_findings(side, ("data", "packing"))
    assert (finding.level, finding.path) == ("error", ("data", "packing"))
    assert "reads images" in finding.message


def test_rows_that_cannot_lie_in_a_line_are_refused(tmp_path, tokenizer):
    class Masking:
        """A user's collator whose mask leaves a token out in the middle of a row."""

        def __call__(self, rows):
            batch = Collator(tokenizer)(rows)
            mask = batch.model_inputs["attention_mask"].clone()
            mask[:, 1] = 0
            return dataclasses.replace(batch, model_inputs={**batch.model_inputs, "attention_mask": mask})

    with pytest.raises(DataError, match="leaves out tokens in front of its last one"):
        trained(tmp_path, tiny.make_qwen3(seed=1), tiny.make_qwen3(seed=2), tokenizer=tokenizer,
                extra={"data_collator": Masking()}, **PADDING_FREE)  # fmt: skip

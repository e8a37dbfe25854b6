"""The evaluation loop on tiny real models: a float64 reference, and that figures depend on the rows alone."""

import json
import math

import pytest
import torch
from accelerate import Accelerator
from peft import get_peft_model

from kdtrain.data import Collator, Source, build_dataset
from kdtrain.errors import NonFiniteError
from kdtrain.losses import TopKLogprobs
from kdtrain.losses.sampled import SampledTargets
from kdtrain.teachers import LocalTeacher, Targets, Teacher
from kdtrain.trainer.evaluation import Evaluation
from tests import tiny
from tests.test_trainer import make_trainer

ROWS = [
    *tiny.CHATS,
    {"messages": [*tiny.CHATS[0]["messages"], *tiny.CHATS[3]["messages"]]},
    {"prompt": "One and one is", "completion": " two, and 30 is more than the student learns."},
]
FIGURES = ("ce", "perplexity", "token_accuracy", "forward_kl", "reverse_kl", "agreement", "ece", "acceptance_rate")


@pytest.fixture(scope="module")
def encoded(tokenizer, tmp_path_factory):
    return encode(tokenizer, tmp_path_factory.mktemp("rows"))


def encode(tokenizer, folder, rows=ROWS, **options):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"max_length": 128, "on_overlength": "error", "train_on": "all", **options}
    return build_dataset([Source(str(path), **options.pop("source", {}))], tokenizer, **options)[0]


def make_evaluation(rows, tokenizer, teacher=None, batch_size=3, columns=320, **options):
    accelerator = Accelerator(cpu=True)
    if isinstance(teacher, torch.nn.Module):
        teacher = LocalTeacher(teacher)
        teacher.place(accelerator)
    collator = Collator(tokenizer, **options)
    return Evaluation(rows, collator, teacher=teacher, columns=columns, batch_size=batch_size, accelerator=accelerator)


def figures(rows, tokenizer, student, teacher=None, **options):
    return make_evaluation(rows, tokenizer, teacher, **options).measure(student).figures()


def assert_same(first, second, rel=1e-5):
    for name in FIGURES:
        assert getattr(first, name) == pytest.approx(getattr(second, name), rel=rel, abs=1e-6), name
    assert first.tokens == second.tokens


def double_reference(rows, student, teacher):
    """All figures in float64, row by row without padding, from the models' own logits."""
    student, teacher = student.double().eval(), teacher.double().eval()
    sums, bins = (
        dict.fromkeys(("ce", "correct", "kl", "reverse", "agree", "overlap"), 0.0),
        [[0, 0, 0.0] for _ in range(15)],
    )
    tokens = 0
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            p, q = (torch.softmax(model(input_ids=ids).logits[0], -1) for model in (student, teacher))
        for t, label in enumerate(row["labels"][1:]):
            if label == -100:
                continue
            a, b = p[t], q[t]
            tokens += 1
            sums["ce"] -= math.log(a[label])
            sums["correct"] += int(a.argmax()) == label
            sums["kl"] += float((b * (b / a).log()).sum())
            sums["reverse"] += float((a * (a / b).log()).sum())
            sums["agree"] += bool(a.argmax() == b.argmax())
            sums["overlap"] += 1 - 0.5 * float((a - b).abs().sum())
            one = bins[min(int(float(a.max()) * 15), 14)]
            one[0] += 1
            one[1] += int(a.argmax()) == label
            one[2] += float(a.max())
    ece = sum(abs(correct - confidence) for _, correct, confidence in bins) / tokens
    means = {name: value / tokens for name, value in sums.items()}
    return means | {"ece": ece, "tokens": tokens}


def test_every_figure_is_that_of_a_float64_reference(encoded, tokenizer):
    student, teacher = tiny.make_qwen3(seed=1), tiny.make_qwen3(seed=2, hidden=48)
    evaluation = make_evaluation(encoded, tokenizer, teacher)
    found = evaluation.measure(student).figures()
    expected = double_reference(encoded, student, teacher)
    named = {"kl": "forward_kl", "reverse": "reverse_kl", "correct": "token_accuracy", "agree": "agreement"}
    for name, value in expected.items():
        field = named.get(name, "acceptance_rate" if name == "overlap" else name)
        assert getattr(found, field) == pytest.approx(value, rel=2e-5), field
    assert found.perplexity == pytest.approx(math.exp(expected["ce"]), rel=1e-4)
    assert found.bounds is None
    of_teacher = evaluation.teacher_sums.figures().as_own_teacher()
    backwards = double_reference(encoded, teacher, student)
    for field in ("ce", "ece", "tokens"):
        assert getattr(of_teacher, field) == pytest.approx(backwards[field], rel=2e-5)
    assert of_teacher.forward_kl == of_teacher.reverse_kl == 0
    assert of_teacher.agreement == of_teacher.acceptance_rate == 1


@pytest.mark.parametrize("make", [tiny.make_llama, tiny.make_gemma2])
def test_biases_caps_and_heads_of_other_families_are_theirs(encoded, tokenizer, make):
    student, teacher = make(seed=1), make(seed=2)
    found = figures(encoded, tokenizer, student, teacher)
    expected = double_reference(encoded, student, teacher)
    assert found.ce == pytest.approx(expected["ce"], rel=2e-5)
    assert found.forward_kl == pytest.approx(expected["kl"], rel=2e-5)


def test_batches_padding_and_the_order_of_rows_change_nothing(encoded, tokenizer):
    student, teacher = tiny.make_qwen3(seed=1), tiny.make_qwen3(seed=2, hidden=48)
    whole = make_evaluation(encoded, tokenizer, teacher, batch_size=1).measure(student)
    for batch_size in (2, 5, 100):
        assert_same(figures(encoded, tokenizer, student, teacher, batch_size=batch_size), whole.figures())
    padded = figures(encoded, tokenizer, student, teacher, batch_size=100, pad_to_multiple_of=64)
    assert_same(padded, whole.figures())
    order = list(reversed(range(len(encoded))))
    turned = make_evaluation(encoded.select(order), tokenizer, teacher).measure(student)
    assert_same(turned.figures(), whole.figures())
    assert turned.column("ce")[order] == pytest.approx(whole.column("ce"), rel=1e-5)  # each row keeps its own sums


def of_ranks(rows, tokenizer):
    student, teacher = tiny.make_qwen3(seed=1), tiny.make_qwen3(seed=2, hidden=48)
    evaluation = make_evaluation(rows, tokenizer, teacher, batch_size=2)
    sums = evaluation.measure(student)
    return [sums.by_row.tolist(), sums.bins.tolist(), evaluation.teacher_sums.by_row.tolist()]


def test_two_ranks_have_the_sums_of_one_process(encoded, tokenizer):
    alone = of_ranks(encoded, tokenizer)
    for found in tiny.run_ranks(of_ranks, 2, encoded, tokenizer):
        for own, expected in zip(found, alone, strict=True):
            assert torch.allclose(torch.tensor(own), torch.tensor(expected), rtol=1e-6)


def test_an_adapter_is_evaluated_as_the_model_that_it_is_merged_into(encoded, tokenizer):
    teacher = tiny.make_qwen3(seed=2, hidden=48)
    torch.manual_seed(5)
    adapted = get_peft_model(tiny.make_qwen3(seed=1), tiny.lora_config(rank=4, alpha=8, dropout=0.5))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.train()  # dropout takes no part, whatever mode a model comes in
    before = figures(encoded, tokenizer, tiny.make_qwen3(seed=1), teacher)
    found = figures(encoded, tokenizer, adapted, teacher)
    assert abs(found.ce - before.ce) > 0.01
    assert_same(figures(encoded, tokenizer, adapted.merge_and_unload(), teacher), found)


def test_it_is_the_cross_entropy_and_the_divergence_that_the_trainer_evaluates(encoded, tokenizer, tmp_path):
    student, teacher = tiny.make_qwen3(seed=1), tiny.make_qwen3(seed=2, hidden=48)
    found = figures(encoded, tokenizer, student, teacher)
    trainer = make_trainer(tmp_path, tiny.make_qwen3(seed=1), tiny.make_qwen3(seed=2, hidden=48), beta=0.0,
                           sft_alpha=1.0, per_device_eval_batch_size=2, extra={"eval_dataset": encoded})  # fmt: skip
    logged = trainer.evaluate()
    assert found.ce == pytest.approx(logged["eval_sft_loss"], rel=1e-6)
    assert found.forward_kl == pytest.approx(logged["eval_llm_kd_loss"], rel=1e-5)
    assert found.token_accuracy == pytest.approx(logged["eval_token_accuracy"])
    assert found.agreement == pytest.approx(logged["eval_teacher_agreement"])


def test_without_a_teacher_there_is_nothing_to_compare_with(encoded, tokenizer):
    student = tiny.make_qwen3(seed=1)
    evaluation = make_evaluation(encoded, tokenizer)
    found = evaluation.measure(student).figures()
    assert found.ce == figures(encoded, tokenizer, student, tiny.make_qwen3(seed=2)).ce
    assert found.forward_kl is found.reverse_kl is found.agreement is found.acceptance_rate is None
    assert evaluation.teacher_sums is None


def test_padding_of_the_vocabulary_takes_no_part(encoded, tokenizer):
    student, wide = tiny.make_qwen3(seed=1), tiny.make_qwen3(seed=1, vocab_size=352)
    wide.load_state_dict(
        {
            name: torch.cat([value, torch.full((32, value.shape[1]), 9.0)]) if value.shape[:1] == (320,) else value
            for name, value in student.state_dict().items()
        }
    )
    teacher = tiny.make_qwen3(seed=2)
    assert_same(figures(encoded, tokenizer, wide, teacher), figures(encoded, tokenizer, student, teacher))
    assert_same(figures(encoded, tokenizer, teacher, wide), figures(encoded, tokenizer, teacher, student))


def test_rows_without_cross_entropy_are_compared_with_the_teacher_alone(encoded, tokenizer, tmp_path):
    """Their labels are not known to be right."""
    student, teacher = tiny.make_qwen3(seed=1), tiny.make_qwen3(seed=2)
    unlabelled = encode(tokenizer, tmp_path, ROWS[:4], source={"ce": False})
    both = encoded.select([5, 6, 7]).to_list() + unlabelled.to_list()
    mixed = unlabelled.from_list(both)
    found = figures(mixed, tokenizer, student, teacher)
    assert found.ce == pytest.approx(figures(encoded.select([5, 6, 7]), tokenizer, student, teacher).ce, rel=1e-6)
    alike = figures(mixed.map(lambda row: {"ce": True}), tokenizer, student, teacher)
    assert found.forward_kl == pytest.approx(alike.forward_kl, rel=1e-6)
    assert found.tokens == alike.tokens
    alone = figures(unlabelled, tokenizer, student, teacher)
    assert alone.ce is alone.perplexity is alone.token_accuracy is alone.ece is None


def test_a_model_that_gives_no_numbers_is_an_error_that_names_a_row(encoded, tokenizer):
    student = tiny.make_qwen3(seed=1)
    with torch.no_grad():
        student.model.norm.weight[3] = torch.nan
    with pytest.raises(NonFiniteError, match=r"gives no number for a token of row 0:\d"):
        figures(encoded, tokenizer, student)


# ---- teachers that are no model in this process ----------------------------------------------------------------------


class Known(Teacher):
    """A teacher of which only some is known: what `form` makes of the model's log-probabilities [S, V]."""

    vocab_size = 320

    def __init__(self, model, form, covered=None):
        self.model, self.form, self.covered, self.asked, self.prepared = LocalTeacher(model), form, covered, 0, []

    def prepare(self, window):
        self.prepared += [batch.rows.ids for batch in window]

    def targets(self, batch):
        assert batch.rows.ids in self.prepared
        self.asked += 1
        targets = self.model.targets(batch)
        log_p = torch.log_softmax(targets.scores.logits(), -1)
        if self.covered is None:
            return Targets(self.form(log_p))
        covered_S = torch.arange(len(log_p)) % self.covered != 0
        return Targets(self.form(log_p[covered_S]), covered_S)


def topk(k):
    return lambda log_p: TopKLogprobs(*reversed(log_p.topk(k, -1)))


def test_a_teacher_of_top_k_tokens_gives_bounds_that_say_so(encoded, tokenizer):
    student, model = tiny.make_qwen3(seed=1), tiny.make_qwen3(seed=2)
    full = figures(encoded, tokenizer, student, tiny.make_qwen3(seed=2))
    evaluation = make_evaluation(encoded, tokenizer, Known(model, topk(8)))
    found, of_teacher = evaluation.measure(student).figures(), evaluation.teacher_sums.figures()
    assert found.bounds == {"forward_kl": "lower", "reverse_kl": "lower", "acceptance_rate": "upper"}
    assert 0 < found.forward_kl < full.forward_kl
    assert found.acceptance_rate > full.acceptance_rate
    assert found.agreement == full.agreement
    assert of_teacher.ce is None  # some labels are not among the eight
    whole = make_evaluation(encoded, tokenizer, Known(model, topk(320)))
    assert_same(whole.measure(student).figures(), full, rel=1e-4)
    assert whole.teacher_sums.figures().ce is not None


def test_dear_targets_are_asked_for_once_for_all_students(encoded, tokenizer):
    teacher = Known(tiny.make_qwen3(seed=2), topk(8))
    evaluation = make_evaluation(encoded, tokenizer, teacher)
    first = evaluation.measure(tiny.make_qwen3(seed=1)).figures()
    assert teacher.asked == len(teacher.prepared) == 3
    evaluation.measure(tiny.make_qwen3(seed=3))
    assert evaluation.measure(tiny.make_qwen3(seed=1)).figures() == first
    assert teacher.asked == len(teacher.prepared) == 3


def test_the_teacher_hears_of_a_batch_before_the_one_in_front_of_it_is_compared(encoded, tokenizer):
    teacher, heard = Known(tiny.make_qwen3(seed=2), topk(8)), []
    targets = teacher.targets
    teacher.targets = lambda batch: heard.append(len(teacher.prepared)) or targets(batch)
    make_evaluation(encoded, tokenizer, teacher).measure(tiny.make_qwen3(seed=1))
    assert heard == [2, 3, 3]


def test_tokens_that_the_teacher_does_not_answer_for_are_predicted_and_not_compared(encoded, tokenizer):
    student, model = tiny.make_qwen3(seed=1), tiny.make_qwen3(seed=2)
    keep_dense = lambda log_p: log_p  # noqa: E731
    full = make_evaluation(encoded, tokenizer, Known(model, keep_dense), batch_size=1).measure(student)
    part = make_evaluation(encoded, tokenizer, Known(model, keep_dense, covered=2), batch_size=1).measure(student)
    assert part.figures().ce == full.figures().ce
    counts = full.column("tokens")
    assert part.column("compared").tolist() == [count // 2 for count in counts]
    assert (part.column("forward_kl") < full.column("forward_kl")).all()


def test_of_drawn_tokens_nothing_can_be_compared(encoded, tokenizer):
    def drawn(log_p):
        return SampledTargets(log_p.topk(2, -1).indices, torch.full((len(log_p), 2), 0.5))

    evaluation = make_evaluation(encoded, tokenizer, Known(tiny.make_qwen3(seed=2), drawn))
    found = evaluation.measure(tiny.make_qwen3(seed=1)).figures()
    assert found.ce is not None
    assert found.forward_kl is found.agreement is found.acceptance_rate is None
    assert evaluation.teacher_sums.figures().ce is None


def test_student_and_teacher_each_read_their_own_text(tokenizer, tmp_path):
    """The teacher's positions are others, and it is compared on the same answers."""
    prefix = [{"role": "system", "content": "The teacher predicts the path."}]
    rows = encode(tokenizer, tmp_path, tiny.CHATS, train_on="assistant", teacher_prefix=prefix)
    student, teacher = tiny.make_qwen3(seed=1), tiny.make_qwen3(seed=1)
    assert rows["teacher_input_ids"][0] != rows["input_ids"][0]
    found = figures(rows, tokenizer, student, teacher)
    kl, tokens = 0.0, 0
    for row in rows:
        with torch.no_grad():
            own, other = (
                torch.log_softmax(student(input_ids=torch.tensor([row[f"{view}input_ids"]])).logits[0].double(), -1)
                for view in ("", "teacher_")
            )
        places = [[t for t, label in enumerate(row[f"{view}labels"][1:]) if label != -100] for view in ("", "teacher_")]
        for here, there in zip(*places, strict=True):
            kl += float((other[there].exp() * (other[there] - own[here])).sum())
            tokens += 1
    assert found.forward_kl == pytest.approx(kl / tokens, rel=1e-4)
    assert found.forward_kl > 0.01

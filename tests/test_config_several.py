"""`rlhf.teachers`, `rlhf.mix`, and divergences by source, as the static check sees them."""

import json

import pytest

from kdtrain.config import ConfigLoader, check_config
from kdtrain.preflight.files import data_files

BASE = {"model": {"model": "org/student"}, "data": {"train": "org/rows"}, "training": {"output_dir": "/runs/x"}}
TWO = {
    "math": {"teacher_model": "org/m"},
    "code": {"backend": "vllm", "base_url": "http://127.0.0.1:9/v1", "model": "c"},
}
HALVES = {"math": 0.5, "code": 0.5}
DENSE = {"math": {"teacher_model": "org/m"}, "code": {"model": "org/c"}}


def found(rlhf, data=None, level="error", **more):
    result = check_config({**BASE, "data": {"train": "org/rows", **(data or {})}, "rlhf": {"lmbda": 0, **rlhf}, **more})
    return {
        found.path: f"{found.message} ({found.hint})"
        for found in (*result.errors, *result.warnings)
        if found.level == level
    }


def source(**options):
    return {"train": [{"path": "org/rows", **options}]}


@pytest.mark.parametrize(
    ("rlhf", "data", "where", "what"),
    [
        ({"teachers": TWO, "teacher_model": "org/x"}, {}, "rlhf.teacher_model", "beside rlhf.teachers"),
        ({"teachers": TWO, "teacher": {"top_k": 3}}, {}, "rlhf.teacher", "beside rlhf.teachers"),
        ({"teachers": TWO}, source(teacher="mat"), "data.train[0].teacher", "did you mean math?"),
        ({"teacher_model": "org/x"}, source(teacher="math"), "data.train[0].teacher", "there is no rlhf.teachers"),
        ({"teachers": {}}, {}, "rlhf.teachers", "expected teachers by name, got none"),
        ({"teachers": {"a/b": {"model": "org/x"}}}, {}, "rlhf.teachers", "letters, digits"),
        ({"teachers": {"a": {"model": "org/x", "teacher_model": "org/y"}}}, {}, "rlhf.teachers.a.model", "the same as"),
        ({"teachers": {"a": {}}}, {}, "rlhf.teachers.a.teacher_model", "set rlhf.teachers.a.teacher_model"),
        ({"teachers": {"a": {"backend": "vllm", "model": "x"}}}, {}, "rlhf.teachers.a.base_url", "a teacher is needed"),
        ({"teachers": {"a": {"foo": 1}}}, {}, "rlhf.teachers.a.foo", "unknown key 'foo' in rlhf.teachers"),
        ({"teachers": {"a": {"model": "org/x", "prefix": [{"role": "system", "content": "x"}]}}}, {},
         "rlhf.teachers.a.prefix", "not available yet"),
        ({"mix": {"a": 1.0}, "teacher_model": "org/x"}, {}, "rlhf.mix", "needs rlhf.teachers"),
        ({"teachers": DENSE, "mix": {"math": 0.5, "code": 0.4}}, {}, "rlhf.mix", "they add up to 0.9"),
        ({"teachers": DENSE, "mix": {"math": 1.5, "code": -0.5}}, {}, "rlhf.mix", "a share above 0"),
        ({"teachers": DENSE, "mix": {"math": 0.5, "code": 0.2, "cod": 0.3}}, {}, "rlhf.mix.cod", "did you mean code?"),
        ({"teachers": DENSE, "mix": {"math": 1.0}}, {}, "rlhf.teachers.code", "has no share"),
        ({"teachers": DENSE, "mix": HALVES, "seq_kd": True}, {}, "rlhf.seq_kd", "needs one teacher"),
        ({"teachers": DENSE, "mix": HALVES}, source(answers="teacher"), "rlhf.mix", "answers: teacher"),
        ({"teachers": TWO, "mix": HALVES}, {}, "rlhf.mix", "not available yet: the mean of full"),
        ({"teacher_model": "org/x"}, source(divergence="jsdd"), "data.train[0].divergence", "did you mean 'jsd'"),
        ({"teacher_model": "org/x"}, source(beta=2), "data.train[0].beta", "at most 1"),
        ({"teacher_model": "org/x", "on_policy": {"beta": -1}}, {}, "rlhf.on_policy.beta", "non-negative"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_error_at_its_place(rlhf, data, where, what):
    errors = found(rlhf, data)
    assert list(errors) == [where]
    assert what in errors[where]


@pytest.mark.parametrize(
    ("rlhf", "data", "where", "what"),
    [
        ({"teacher_model": "org/x", "on_policy": {"beta": 0.3}}, {}, "rlhf.on_policy.beta", "lmbda is 0"),
        ({"llm_kd_weight": 0}, source(divergence="tvd"), "data.train[0].divergence", "llm_kd_weight is 0"),
        ({"teacher_model": "org/x"}, source(divergence="tvd", beta=0.1), "data.train[0].beta", "its divergence is tvd"),
        ({"teacher_model": "org/x", "lmbda": 1, "on_policy": {"divergence": "tvd"}}, source(divergence="skew_kl"),
         "data.train[0].divergence", "every answer is the student's"),
        ({"teachers": DENSE, "mix": HALVES}, source(teacher="math"), "data.train[0].teacher", "every row"),
        ({"teachers": {"math": {"model": "org/x", "top_k": 3}}}, {}, "rlhf.teachers.math.top_k",
         "rlhf.teachers.math.backend is hf"),
        ({"llm_kd_weight": 0, "teachers": DENSE}, {}, "rlhf.teachers", "nothing asks the teacher"),
    ],
)  # fmt: skip
def test_what_has_no_effect_is_a_warning(rlhf, data, where, what):
    warnings = found(rlhf, data, level="warning")
    assert what in warnings[where]
    assert not found(rlhf, data)


def test_numbers_of_a_divergence_count_where_any_rows_are_compared_by_it():
    assert "rlhf.skew_alpha" in found({"teacher_model": "org/x", "skew_alpha": 0.3}, level="warning")
    own = source(divergence="skew_kl")
    assert "rlhf.skew_alpha" not in found({"teacher_model": "org/x", "skew_alpha": 0.3}, own, level="warning")
    samples = {
        "teacher_model": "org/x",
        "skew_alpha": 0.3,
        "lmbda": 0.5,
        "on_policy": {"divergence": "skew_reverse_kl"},
    }
    assert "rlhf.skew_alpha" not in found(samples, level="warning")


def test_a_tail_that_a_sources_divergence_cannot_have_is_refused():
    teacher = {"backend": "vllm", "base_url": "http://127.0.0.1:9/v1", "model": "c", "tail": "renormalize"}
    assert "must be bucket" in found({"teacher": teacher, "beta": 0}, source(divergence="tvd"))["rlhf.teacher.tail"]
    assert not found({"teacher": teacher, "beta": 0})


def test_relative_paths_of_teachers_begin_at_the_file(tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    config = tmp_path / "c.yaml"
    config.write_text(
        json.dumps({**BASE, "rlhf": {"teachers": {"a": {"model": "./m"}, "b": {"teacher_model": "org/x"}}}})
    )
    teachers = ConfigLoader.load(config).rlhf.teachers
    assert teachers["a"].teacher_model == str(tmp_path / "m")
    assert teachers["b"].teacher_model == "org/x"


@pytest.mark.parametrize(
    ("row", "options", "what"),
    [({}, {}, "names no teacher"), ({"teacher": "mth"}, {}, "did you mean math?"), ({}, {"teacher": "math"}, None),
     ({"teacher": "code"}, {}, None),
     ({"area": "code"}, {"columns": {"messages": "messages", "teacher": "area"}}, None)],
)  # fmt: skip
def test_the_first_row_of_a_file_shows_whether_rows_name_a_teacher(tmp_path, row, options, what):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": messages, **row}) + "\n")
    data = {"train": {"path": str(tmp_path / "rows.jsonl"), **options}}
    config = ConfigLoader.load({**BASE, "data": data, "rlhf": {"teachers": TWO}})
    problems = [problem.message for problem in data_files(config)]
    assert [what in message for message in problems] == ([] if what is None else [True])

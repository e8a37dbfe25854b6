"""What a cache is made from, by the words of the config, and what of it is compared."""

import pytest

from kdtrain.config import ConfigLoader
from kdtrain.errors import DataError
from kdtrain.models.processing import load_processing
from kdtrain.runs.made_from import made_from
from kdtrain.teachers.cached.manifest import MANIFEST, Manifest, differences, identified
from kdtrain.teachers.cached.store import Format
from tests import tiny

TEACHER = "teacher (rlhf.teacher_model)"


def facts(project, *overrides, **options):
    config = ConfigLoader.load(project / "config.yaml", list(overrides))
    return made_from(config, load_processing(config.model.model), **options)


def from_cache(project, cache, *overrides):
    """Of a run that trains from it: the backend that wrote it is not in its config."""
    config = ConfigLoader.load(project / "config.yaml", list(overrides))
    teacher = config.rlhf.teacher.model_copy(update={"backend": "cache"})
    config = config.model_copy(update={"rlhf": config.rlhf.model_copy(update={"teacher": teacher})})
    return differences(cache, made_from(config, load_processing(config.model.model), like=cache))


def test_the_same_config_differs_in_nothing(project):
    cache = facts(project, dtype="float32", precision="no")
    assert from_cache(project, cache) == []


@pytest.mark.parametrize(
    ("override", "what"),
    [
        ("data.train_on=last", "data.train_on: assistant. This run has: last."),
        ("data.turns=joint", "data.turns: auto. This run has: joint."),
        ("data.chat_template_kwargs={a: 1}", 'data.chat_template_kwargs: none. This run has: {"a": 1}.'),
        ("rlhf.teacher.chat_template_kwargs={a: 1}", "rlhf.teacher.chat_template_kwargs: none."),
        ("data.on_overlength=truncate", "data.max_length that rows are cut at (data.on_overlength: truncate): none."),
        ("rlhf.teacher.prefix=[{role: system, content: Hi.}]", "rlhf.teacher.prefix: none."),
        ("rlhf.teacher.dtype=bfloat16", "rlhf.teacher.dtype: float32. This run has: bfloat16."),
        ("rlhf.teacher.processor_kwargs={a: 1}", "rlhf.teacher.processor_kwargs: data.processor_kwargs."),
    ],
)
def test_a_run_that_differs_is_told_in_what_and_in_nothing_else(project, override, what):
    found = from_cache(project, facts(project, dtype="float32"), override)
    assert found[0].startswith(f"This cache was made with another {what}")
    assert len(found) == 1 + ("prefix" in override)


@pytest.mark.parametrize(
    "override",
    [
        "data.max_length=80",
        "rlhf.beta=0.1",
        "training.learning_rate=0.1",
        "rlhf.teacher.top_k=3",
        "data.train=eval.jsonl",
    ],
)
def test_what_targets_do_not_depend_on_is_not_compared(project, override):
    assert from_cache(project, facts(project), override) == []


def test_a_teacher_is_its_content_and_not_its_place(project):
    cache = facts(project)
    (project / "teacher").rename(project / "moved")
    assert from_cache(project, cache, f"rlhf.teacher_model={project}/moved") == []
    found = from_cache(project, cache, f"rlhf.teacher_model={project}/student")
    assert len(found) == 1
    assert f"another {TEACHER}: {project}/teacher. This run has: {project}/student." in found[0]


@pytest.mark.parametrize("override", ["rlhf.teacher_model=/nowhere/teacher", "rlhf.teacher_model=null"])
def test_a_teacher_that_is_not_there_is_not_compared(project, override):
    cache = facts(project)
    config = ConfigLoader.load(project / "config.yaml", [])
    name = None if override.endswith("null") else "/nowhere/teacher"
    config = config.model_copy(update={"rlhf": config.rlhf.model_copy(update={"teacher_model": name})})
    assert TEACHER not in made_from(config, load_processing(config.model.model))
    assert differences(cache, made_from(config, load_processing(config.model.model), like=cache)) == []


def test_weights_of_the_same_name_with_one_bit_changed_are_another_teacher(project):
    cache = facts(project)
    path = project / "teacher" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    (found,) = from_cache(project, cache)
    assert "content " in found


@pytest.mark.parametrize(
    ("override", "found"),
    [
        ("rlhf.teacher.weights=ema", "rlhf.teacher.weights: base. This run has: ema."),
        (
            "model.init_kwargs={num_hidden_layers: 1}",
            'model.init_kwargs: none. This run has: {"num_hidden_layers": 1}.',
        ),
    ],
)
def test_of_a_student_that_is_its_own_teacher_its_weights_count(project, override, found):
    itself = ["rlhf.teacher.backend=self", "rlhf.teacher_model=null", "tuner.train_type=lora"]
    cache = facts(project, *itself, dtype="float32")
    assert from_cache(project, cache, *itself) == []
    assert from_cache(project, cache, *itself, override) == [f"This cache was made with another {found}"]
    assert from_cache(project, facts(project), "model.init_kwargs={num_hidden_layers: 1}") == []  # another teaches


def test_weights_in_a_gguf_file_count(project):
    (project / "teacher" / "model.gguf").write_bytes(b"one")
    cache = facts(project)
    (project / "teacher" / "model.gguf").write_bytes(b"two")
    assert len(from_cache(project, cache)) == 1


def test_of_another_tokenizer_and_template_both_are_named(project):
    cache = facts(project)
    tokenizer = tiny.make_tokenizer(vocab_size=310)
    tokenizer.chat_template += " "
    tokenizer.save_pretrained(project / "student")
    found = from_cache(project, cache)
    assert [line.split(":")[0] for line in found] == [
        "This cache was made with another tokenizer",
        "This cache was made with another chat template",
    ]


# ---- the file --------------------------------------------------------------------------------------------------------


def manifest(**options):
    values = {"form": Format("topk", 320, entries=5), "made_from": {"a": "b", "c": identified("name", "hash")}}
    values |= {"versions": {"torch": "2"}, "rows": 3, "rows_per_shard": 2, "complete": False}
    return Manifest(**{**values, **options})


def test_it_is_read_as_it_was_written_and_nothing_of_the_time_is_in_it(tmp_path):
    one = manifest()
    one.write(tmp_path)
    first = (tmp_path / MANIFEST).read_bytes()
    assert Manifest.read(tmp_path) == one
    one.write(tmp_path)
    assert (tmp_path / MANIFEST).read_bytes() == first
    assert [path.name for path in tmp_path.iterdir()] == [MANIFEST]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read"),
        ("[]", "is not that of a cache"),
        ('{"a": 1}', "is not that of a cache"),
        ('{"kind": "kdtrain cache", "version": "\\u001b[31m"}', "is of version '?\\\\x1b"),
        ('{"kind": "kdtrain cache", "version": 1}', "is damaged"),
        ('{"kind": "kdtrain cache", "version": 1, "form": {"x": 1}}', "is damaged"),
    ],
)
def test_what_is_no_manifest_is_one_clear_error(tmp_path, text, message):
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(DataError, match=message):
        Manifest.read(tmp_path)


def test_a_folder_without_one_is_no_cache(tmp_path):
    with pytest.raises(DataError, match=r"is no cache: it has no manifest\.json"):
        Manifest.read(tmp_path)


def test_what_only_one_side_knows_is_not_compared():
    assert differences({"a": 1, "b": 2}, {"b": 3, "c": 4}) == [
        "This cache was made with another b: 2. This run has: 3."
    ]

"""Every chat template that trl ships, on tokenizers that people train. `make test-real`: it fetches 125 MB once."""

import copy
import json
import os

import pytest

from kdtrain.data import RowError, Source, build_dataset
from kdtrain.data.encoded_row import truncate
from kdtrain.data.encoder import RowEncoder
from kdtrain.errors import DataError
from tests.templates.check import TRAIN_ON, judged
from tests.templates.families import named_template, names
from tests.templates.real_tokenizers import INTEGRITY, CannotFetch, real_tokenizer
from tests.templates.rows import kinds
from tests.test_data_prefix import by_hand

pytestmark = pytest.mark.real


@pytest.fixture(scope="module", autouse=True)
def tokenizers():
    try:
        return {name: real_tokenizer(name) for name in INTEGRITY}
    except CannotFetch as error:
        if os.environ.get("CI", "").lower() in ("1", "true"):
            raise
        pytest.skip(str(error))


def test_the_tokenizers_are_the_published_ones(tokenizers):
    sizes = {name: len(tokenizer) for name, tokenizer in tokenizers.items()}
    assert sizes == {"qwen3": 151669, "gemma3": 262145, "llama3_1": 128256, "deepseek_v3": 128815, "gptoss": 200019}


@pytest.mark.parametrize("name", names())
def test_every_kind_of_row_comes_out_as_the_template_renders_it_or_is_refused_with_a_true_reason(name):
    wrong = [
        f"{kind}, train_on {train_on}: {verdict.detail}"
        for train_on, cells in judged(named_template(name)).items()
        for kind, verdict in cells.items()
        if verdict.outcome == "wrong"
    ]
    assert not wrong, "\n".join([f"{len(wrong)} wrong", *wrong])


@pytest.mark.parametrize("name", ["qwen3", "phi3", "gptoss", "deepseekv3"])
@pytest.mark.parametrize("train_on", TRAIN_ON)
def test_a_data_set_has_the_rows_of_the_encoder_and_leaves_out_those_that_it_refuses(name, train_on, tmp_path):
    template = named_template(name)
    rows = kinds(template.control_token)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows.values()))
    options = {"max_length": None, "on_overlength": "error", "cache_dir": str(tmp_path)}
    source = [Source(str(tmp_path / "rows.jsonl"))]
    built, _ = build_dataset(source, template.tokenizer, train_on=train_on, max_bad_rows=len(rows), **options)
    encoded = RowEncoder(template.tokenizer, train_on).encode(list(rows.values()), [None] * len(rows))
    expected = [
        (f"0:{i}", one.input_ids, one.labels, one.prompt_length)
        for i, made in enumerate(encoded)
        if not isinstance(made, RowError)
        for one in made
    ]
    found = [
        (":".join(row["row_id"].split(":")[:2]), row["input_ids"], row["labels"], row["prompt_length"]) for row in built
    ]
    assert found == expected
    assert len({row["row_id"] for row in built}) == len(built)


@pytest.mark.parametrize("name", ["qwen3_5_think", "gemma3", "llama3_1"])
def test_a_long_answer_is_cut_from_the_right_and_keeps_its_prompt(name):
    template = named_template(name)
    whole = RowEncoder(template.tokenizer, "last").encode([kinds("")["long"]], [None])[0][0]
    cut = truncate(whole, 300)
    assert (cut.input_ids, cut.labels, cut.prompt_length) == (
        whole.input_ids[:300],
        whole.labels[:300],
        whole.prompt_length,
    )
    assert cut.labels[-1] == cut.input_ids[-1]


RULE = {"role": "system", "content": "Talk like a pirate."}
SHOWN = [{"role": "user", "content": "Which lake is deepest?"}, {"role": "assistant", "content": "Arr, Baikal."}]
OF_TRL = ("qwen3", "qwen2_5", "llama3", "llama3_1", "gemma", "gemma3", "phi3", "gptoss", "deepseekv3")


@pytest.mark.parametrize("name", [*OF_TRL, "own qwen3", "own gemma3"])
@pytest.mark.parametrize(("prefix", "mode"), [([RULE], "prepend"), ([RULE, *SHOWN], "system"), (SHOWN, "prepend")])
def test_a_teacher_with_a_prefix_reads_what_a_row_with_these_messages_is_rendered_to(name, prefix, mode):
    template, compared = named_template(name), 0
    options = {"teacher_prefix": prefix, "teacher_prefix_mode": mode}
    for kind, row in kinds(template.control_token).items():
        if not isinstance(encoded(template, row), list):
            continue  # the student cannot read it
        found, expected = encoded(template, row, **options), encoded(template, by_hand(row, prefix, mode))
        if not isinstance(expected, list):
            assert "rlhf.teacher.prefix" in str(found), kind
            continue
        assert [(one.teacher or one).input_ids for one in found] == [one.input_ids for one in expected], kind
        assert all((one.teacher or one).supervised_ids == one.supervised_ids for one in found), kind
        compared += 1
    assert compared >= 16 or (name == "gemma" and prefix is not SHOWN)  # which has no system messages


def encoded(template, row, **options):
    """The rows, or what is wrong."""
    try:
        return RowEncoder(template.tokenizer, "assistant", **options).encode([copy.deepcopy(row)], [None])[0]
    except DataError as error:
        return error

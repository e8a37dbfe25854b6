"""Rows to padded batches."""

import pytest
import torch

from kdtrain.data import Collator, RowError, TemplateOptions, encode_row, pad_rows
from kdtrain.data.encoder import RowEncoder
from kdtrain.errors import DataError
from tests import tiny
from tests.test_data_encoder import FORGETFUL, ROW, tokenizer_with

SHORT = {"prompt": "the", "completion": " path"}
PROMPT = {"prompt": "the file it returns"}


def encoded(row, tokenizer, **extra):
    result = encode_row(row, tokenizer, train_on="assistant")
    return {
        "input_ids": result.input_ids,
        "labels": result.labels,
        "prompt_length": result.prompt_length,
        **extra,
    }


def test_a_batch_has_what_the_trainer_needs(tokenizer):
    rows = [encoded(ROW, tokenizer, ce=False, row_id="1:4"), encoded(SHORT, tokenizer, ce=True, row_id="0:2")]
    batch = Collator(tokenizer)(rows)
    width = len(rows[0]["input_ids"])
    ids, mask = batch.model_inputs["input_ids"], batch.model_inputs["attention_mask"]
    assert ids.shape == mask.shape == batch.labels.shape == (2, width)
    assert ids.dtype == batch.labels.dtype == batch.rows.prompt_lengths.dtype == torch.long
    assert batch.model_inputs["attention_mask"].sum(1).tolist() == [len(row["input_ids"]) for row in rows]
    assert batch.rows.prompt_lengths.tolist() == [row["prompt_length"] for row in rows]
    assert batch.rows.ce.tolist() == [False, True]
    assert batch.rows.ids == ["1:4", "0:2"]


def test_raw_rows_are_encoded_like_those_of_a_built_data_set(tokenizer):
    raw = [ROW, SHORT, PROMPT, {"text": "zero"}]
    built = Collator(tokenizer)([encoded(row, tokenizer) for row in raw])
    direct = Collator(tokenizer)(raw)
    tiny.assert_same_batch(built, direct)
    last = Collator(tokenizer, template=TemplateOptions("last"))([ROW])
    assert 0 < (last.labels != -100).sum() < (direct.labels[0] != -100).sum()


CHANGES = {
    "template": lambda tokenizer: setattr(tokenizer, "chat_template", tiny.CHATML.replace("<|im_end|>", "</turn>")),
    "end of sequence": lambda tokenizer: setattr(tokenizer, "eos_token", "<|endoftext|>"),
    "added token": lambda tokenizer: tokenizer.add_tokens("the"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_trainer_changes_of_the_tokenizer_counts_for_the_next_batch(change):
    tokenizer = tokenizer_with()
    collate = Collator(tokenizer)
    rows = [ROW, {"text": "the path"}]
    before = collate(rows).model_inputs["input_ids"].tolist()
    CHANGES[change](tokenizer)
    after = collate(rows)
    assert after.model_inputs["input_ids"].tolist() != before
    tiny.assert_same_batch(Collator(tokenizer)(rows), after)


def test_raw_rows_of_a_batch_share_one_encoder_and_go_through_it_together(tokenizer, monkeypatch):
    made, calls = [], []
    prepare, encode = RowEncoder.__init__, RowEncoder.encode
    monkeypatch.setattr(RowEncoder, "__init__", lambda self, *a, **k: made.append(self) or prepare(self, *a, **k))
    monkeypatch.setattr(RowEncoder, "encode", lambda self, *args: calls.append(len(args[0])) or encode(self, *args))
    collate = Collator(tokenizer)
    tokenised = {"input_ids": [1, 2], "labels": [1, 2]}
    collate([tokenised])
    assert (len(made), calls) == (0, [])  # which also serves a tokenizer that raw rows cannot have
    collate([ROW, tokenised, SHORT, PROMPT])
    collate([ROW])
    assert (len(made), calls) == (1, [3, 1])
    collate.template = TemplateOptions("last")
    last = Collator(tokenizer, template=TemplateOptions("last"))
    assert (collate([ROW]).labels != -100).sum() == (last([ROW]).labels != -100).sum()
    assert (collate([ROW]).labels != -100).sum() < (Collator(tokenizer)([ROW]).labels != -100).sum()


def test_the_first_row_that_cannot_be_encoded_is_the_one_that_is_named(tokenizer):
    broken, empty = {"input_ids": [1, 2], "row_id": "3:7"}, {"text": ""}
    with pytest.raises(DataError, match="3:7"):
        Collator(tokenizer)([ROW, broken, empty])
    with pytest.raises(RowError, match="text is empty"):
        Collator(tokenizer)([ROW, empty, broken])


@pytest.mark.parametrize("pad", ["<|im_end|>", None])
def test_an_eos_that_is_also_the_padding_stays_visible_and_supervised(pad):
    tokenizer = tokenizer_with(pad=pad)
    batch = Collator(tokenizer)([ROW, SHORT])
    eos, real = tokenizer.eos_token_id, batch.model_inputs["attention_mask"].bool()
    assert batch.model_inputs["input_ids"][1][real[1]][-1] == eos
    assert batch.labels[1][real[1]][-1] == eos
    assert (batch.model_inputs["input_ids"][1][~real[1]] == eos).all()
    assert (batch.labels[1][~real[1]] == -100).all()
    assert tokenizer.pad_token == pad  # the tokenizer is the caller's


def test_padding_does_not_change_what_the_model_computes(tokenizer):
    model = tiny.make_qwen3(seed=3).eval()
    alone = Collator(tokenizer)([SHORT])
    padded = Collator(tokenizer, pad_to_multiple_of=64)([ROW, SHORT])
    assert padded.model_inputs["input_ids"].shape[1] % 64 == 0
    n = alone.model_inputs["input_ids"].shape[1]
    assert torch.equal(alone.labels[0], padded.labels[1, :n])
    with torch.no_grad():
        one = model(
            input_ids=alone.model_inputs["input_ids"], attention_mask=alone.model_inputs["attention_mask"]
        ).logits
        two = model(
            input_ids=padded.model_inputs["input_ids"], attention_mask=padded.model_inputs["attention_mask"]
        ).logits
    torch.testing.assert_close(one[0], two[1, :n], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("multiple", "width"), [(None, 3), (1, 3), (3, 3), (8, 8)])
def test_pad_rows_pads_on_the_right_and_never_trains_on_the_first_token(multiple, width):
    batch = pad_rows([([5, 6, 7], [5, 6, 7]), ([7], [-100])], pad_id=7, multiple=multiple)
    tail = [0] * (width - 3)
    assert batch["input_ids"].tolist() == [[5, 6, 7] + [7] * len(tail), [7, 7, 7] + [7] * len(tail)]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, *tail], [1, 0, 0, *tail]]
    assert batch["labels"].tolist() == [[-100, 6, 7] + [-100] * len(tail), [-100] * width]


def test_a_row_over_max_length_is_refused_cut_from_the_right_or_left_out(tokenizer):
    whole = encode_row(ROW, tokenizer, train_on="assistant")
    limit = whole.prompt_length + 2
    with pytest.raises(DataError, match=rf"{len(whole.input_ids)} tokens, max_length is {limit}"):
        Collator(tokenizer, max_length=limit)([ROW])
    cut = Collator(tokenizer, max_length=limit, on_overlength="truncate")([ROW])
    assert cut.model_inputs["input_ids"][0].tolist() == whole.input_ids[:limit]
    assert cut.labels[0].tolist() == whole.labels[:limit]
    assert len(Collator(tokenizer, max_length=limit, on_overlength="drop")([ROW, SHORT]).rows.ids) == 1
    with pytest.raises(DataError, match="every row of a batch of 1"):
        Collator(tokenizer, max_length=limit, on_overlength="drop")([ROW])


def test_rows_that_cannot_be_collated_are_named(tokenizer):
    with pytest.raises(RowError, match="none of the columns"):
        Collator(tokenizer)([{"question": "x"}])
    with pytest.raises(DataError, match=r"3:7.*2 ids, 0 labels"):
        Collator(tokenizer)([{"input_ids": [1, 2], "row_id": "3:7"}])
    with pytest.raises(DataError, match="on_overlength must be one of"):
        Collator(tokenizer, on_overlength="cut")


def test_rows_of_a_data_set_in_torch_format_are_accepted(tokenizer):
    row = encoded(ROW, tokenizer, ce=True, row_id="0:0")
    tensors = {**row, "input_ids": torch.tensor(row["input_ids"]), "labels": torch.tensor(row["labels"])}
    assert torch.equal(Collator(tokenizer)([tensors]).labels, Collator(tokenizer)([row]).labels)


def test_a_raw_conversation_whose_turns_cannot_share_a_row_becomes_several_rows_of_the_batch():
    tokenizer = tokenizer_with(FORGETFUL)
    batch = Collator(tokenizer)([{**SHORT, "row_id": "a"}, {**ROW, "row_id": "b"}])
    assert list(batch.rows.ids) == ["a", "b", "b"]
    texts = [tokenizer.decode(row[row != -100]) for row in batch.labels]
    assert texts[1:] == ["the one<|im_end|>", "two it is<|im_end|>"]
    rows = zip(batch.model_inputs["input_ids"], batch.rows.prompt_lengths, strict=True)
    prompts = [tokenizer.decode(ids[:length]) for ids, length in rows]
    assert prompts[1].endswith("first question<|im_end|>\n<|im_start|>assistant\n")
    assert prompts[2].endswith("and then<|im_end|>\n<|im_start|>assistant\n")


def test_a_batch_knows_which_of_the_given_rows_each_of_its_rows_comes_from():
    tokenizer = tokenizer_with(FORGETFUL)
    late = {"messages": [*ROW["messages"][:2], {"role": "user", "content": "the path " * 60}, ROW["messages"][1]]}

    def places(*rows, **options):
        return Collator(tokenizer, **options)(list(rows)).rows.places

    assert places(SHORT, SHORT) is None
    assert places(SHORT, ROW, SHORT) == [0, 1, 1, 2]
    dropping = {"max_length": 100, "on_overlength": "drop"}
    assert places(ROW, late, SHORT, **dropping) == [0, 0, 1, 2]
    assert places(SHORT, late, **dropping) is None
    assert places(ROW, {"prompt": "the path " * 60}, **dropping) == [0, 0]

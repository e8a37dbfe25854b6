"""Whether two models predict over the same token ids, and over which range of them they can be compared."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kdtrain.errors import VocabularyError


@dataclass(frozen=True)
class Vocabulary:
    """Logit columns of both models when the trainer was built, and how many leading ones they share."""

    student: int
    teacher: int
    shared: int

    def check(self, student: int, teacher: int) -> None:
        if (student, teacher) != (self.student, self.teacher):
            raise VocabularyError(
                f"Vocabulary sizes differ at this step: the student has {student} logits and the teacher {teacher}. "
                f"When the trainer was built they had {self.student} and {self.teacher}: do not resize a model after "
                "that."
            )


def vocabulary_size(model: PreTrainedModel) -> int:
    """Columns of the logits, padding included. A vision-language model keeps the number in its text config."""
    return model.config.get_text_config().vocab_size


def shared_vocabulary(
    student_size: int,
    teacher_size: int,
    student_tokenizer: PreTrainedTokenizerBase | None,
    teacher_tokenizer: PreTrainedTokenizerBase | None,
) -> int:
    """Number of leading logit columns that mean the same token in both models.

    Sizes may differ only in the padding of the embedding (Qwen2.5 has 151936 rows up to 3B and 152064 above, with one
    tokenizer): then the loss runs over the smaller range, and the columns beyond it take no part on either side.
    Tokenizers are compared by content where both are known.
    """
    sizes = f"the student has {student_size} logits and the teacher {teacher_size}"
    if student_tokenizer is not None and teacher_tokenizer is not None:
        difference = tokenizer_difference(student_tokenizer, teacher_tokenizer)
        if difference:
            raise VocabularyError(
                f"Student and teacher have different vocabularies: {difference} ({sizes}). Token-level distillation "
                "compares distributions over one vocabulary: set rlhf.cross_tokenizer: alm, which compares likelihoods "
                "of text, or use a teacher and a student of one tokenizer family."
            )
        tokens = len(student_tokenizer)
        if tokens <= min(student_size, teacher_size):
            return min(student_size, teacher_size)
        raise VocabularyError(
            f"The tokenizer has {tokens} tokens, more than the smaller model can predict: {sizes}. "
            "Resize that model's embedding, or use the tokenizer it was trained with."
        )
    if student_size != teacher_size:
        raise VocabularyError(
            f"Vocabulary sizes differ: {sizes}. This is fine only if both use the same tokenizer and the rest is "
            "padding, which cannot be checked without both tokenizers: save the tokenizer in the teacher's folder."
        )
    return student_size


def tokenizer_difference(first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase) -> str | None:
    """What differs between two tokenizers' vocab, merges or added tokens, in words; None if they are the same.

    The roles of tokens (which one is eos or pad) are not compared: a base model and its chat version differ there.
    """
    vocab_a, vocab_b = first.get_vocab(), second.get_vocab()
    if vocab_a != vocab_b:
        by_id_a, by_id_b = ({i: token for token, i in vocab.items()} for vocab in (vocab_a, vocab_b))
        ids = sorted(i for i in by_id_a.keys() | by_id_b.keys() if by_id_a.get(i) != by_id_b.get(i))
        shown = ", ".join(f"{i} ({by_id_a.get(i)!r} / {by_id_b.get(i)!r})" for i in ids[:3])
        return (
            f"{len(ids)} token ids differ (student vocabulary {len(vocab_a)}, teacher {len(vocab_b)}), first: {shown}"
        )
    if _merges(first) != _merges(second):
        return "the same tokens, but other merge rules, so that a text gets other ids"
    special_a, special_b = (
        {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} for tokenizer in (first, second)
    )
    if special_a != special_b:
        return f"other special tokens, ids {sorted(special_a ^ special_b)[:3]}"
    return None


def _merges(tokenizer: PreTrainedTokenizerBase) -> Any:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return None if backend is None else json.loads(backend.to_str())["model"].get("merges")

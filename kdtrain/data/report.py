"""What became of the rows of a data set, in numbers and in words."""

from __future__ import annotations

from dataclasses import dataclass, field

from kdtrain.data.epochs import Epochs

_NO_STOP = "the student will not learn to stop there"


@dataclass
class BuildReport:
    """Rows are counted once; tokens and `rows_per_epoch` as often as the weights repeat them."""

    rows_read: int = 0  # after `limit`, weights below 1 and `sample_limit`
    rows_kept: int = 0  # can be trained on or generated from
    rows_per_epoch: int = 0  # and of the data set, unless `epochs` says otherwise
    bad_rows: int = 0  # left out as unusable
    first_bad: list[str] = field(default_factory=list)  # of three, as `file:line: reason`
    truncated: int = 0  # kept, and cut at max_length
    dropped: int = 0  # left out: too long, or with nothing to train on once truncated
    supervised_tokens: int = 0
    total_tokens: int = 0
    prompt_only_rows: int = 0  # kept, without an answer; those that the teacher answers are not among them
    plain_text_rows: int = 0  # kept; nothing can be generated from them
    teacher_answer_rows: int = 0  # kept; the teacher writes their answer
    image_rows: int = 0  # kept, with images
    images: int = 0  # of them in all
    longest: int = 0  # tokens of a row before truncation
    stop_tokens_added: int = 0  # rows whose template marks the answer without the token that ends it
    unterminated_rows: int = 0  # with a supervised turn that ends without a stop token
    notes: list[str] = field(default_factory=list)
    epochs: Epochs | None = None  # which rows of the data set make up each epoch; None: all, in every epoch

    def summary(self) -> str:
        """Some lines for people; counts of zero are left out, except the bad rows."""
        share = self.supervised_tokens / max(self.total_tokens, 1)
        lines = [
            f"{self.rows_kept} of {self.rows_read} rows, {self.rows_per_epoch} per epoch; "
            f"{self.supervised_tokens} of {self.total_tokens} tokens supervised ({share:.0%}); "
            f"longest row {self.longest} tokens; {self.bad_rows} bad rows"
        ]
        lines += [f"  bad: {bad}" for bad in self.first_bad]
        counts = (
            (self.truncated, "truncated at max_length"),
            (self.dropped, "dropped: too long, and a cut would leave nothing to train on or take a part of an image"),
            (self.prompt_only_rows, "with a prompt only (usable where an answer is generated)"),
            (self.plain_text_rows, "of plain text (nothing is generated from them)"),
            (self.teacher_answer_rows, "get their answer from the teacher"),
            (self.image_rows, f"with images ({self.images} in all)"),
            (self.stop_tokens_added, "got the end-of-turn token into the mask, which the template's markers leave out"),
            (self.unterminated_rows, f"end a turn without an end-of-turn token: {_NO_STOP}"),
        )
        lines += [f"  {count} rows {what}" for count, what in counts if count]
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])

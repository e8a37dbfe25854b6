"""What became of the rows of a data set, in numbers and in words."""

from __future__ import annotations

from dataclasses import dataclass, field

from kdtrain.data.epochs import Epochs


@dataclass
class BuildReport:
    """What became of the rows. Rows are counted once; tokens and `rows_per_epoch` as often as the weights repeat them.

    Attributes:
        rows_read: rows looked at, after `limit`, weights below 1 and `sample_limit`.
        rows_kept: those that can be trained on or generated from.
        rows_per_epoch: length of an epoch, and of the data set unless `epochs` says otherwise.
        epochs: which rows of the data set make up each epoch; None: all of them, in every epoch.
        bad_rows: rows left out as unusable.
        first_bad: the first three, as `file:line: reason`.
        truncated: kept rows that were cut at max_length.
        dropped: rows left out because they are too long, or have nothing to train on once truncated.
        supervised_tokens, total_tokens: per epoch.
        prompt_only_rows: kept rows without an answer; they need generation. Those for the teacher are not among them.
        plain_text_rows: kept rows of plain text; nothing can be generated from them.
        teacher_answer_rows: kept rows whose answer the teacher writes.
        image_rows, images: kept rows with images, and their images.
        longest: tokens of the longest row, before truncation.
        stop_tokens_added: rows whose template marks the answer but not the token that ends it; it was added.
        unterminated_rows: rows with a supervised turn that ends without a stop token.
        notes: other things worth a warning.
    """

    rows_read: int = 0
    rows_kept: int = 0
    rows_per_epoch: int = 0
    bad_rows: int = 0
    first_bad: list[str] = field(default_factory=list)
    truncated: int = 0
    dropped: int = 0
    supervised_tokens: int = 0
    total_tokens: int = 0
    prompt_only_rows: int = 0
    plain_text_rows: int = 0
    teacher_answer_rows: int = 0
    image_rows: int = 0
    images: int = 0
    longest: int = 0
    stop_tokens_added: int = 0
    unterminated_rows: int = 0
    notes: list[str] = field(default_factory=list)
    epochs: Epochs | None = None

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
            (
                self.unterminated_rows,
                "end a turn without an end-of-turn token: the student will not learn to stop there",
            ),
        )
        lines += [f"  {count} rows {what}" for count, what in counts if count]
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])

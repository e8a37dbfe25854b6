"""Finding a conversation again in what a processor makes of it: the text between the images, and so the turns in it."""

from __future__ import annotations

from kdtrain.data.errors import RowError, show


class Alignment:
    """Where the pieces of text between the placeholders of `text` are in `expanded`.

    What a processor writes for an image may look like text that follows it (row numbers, line breaks), so a search for
    a piece may hit inside an image. The pieces are therefore laid out twice, as far left and as far right as they go:
    every other way lies between the two, so where they agree there is no other, and elsewhere it is an error.
    """

    def __init__(self, text: str, expanded: str, placeholder: str) -> None:
        self._pieces = text.split(placeholder)
        self._starts: list[int] = []
        at = 0
        for piece in self._pieces:
            self._starts.append(at)
            at += len(piece) + len(placeholder)
        for edge, is_there in ((self._pieces[0], expanded.startswith), (self._pieces[-1], expanded.endswith)):
            if not is_there(edge):
                raise _lost(edge, expanded)
        self._left = self._lay(expanded, self._pieces)
        reversed_starts = self._lay(expanded[::-1], [piece[::-1] for piece in reversed(self._pieces)])
        ends = [len(expanded) - start for start in reversed(reversed_starts)]
        self._right = [end - len(piece) for end, piece in zip(ends, self._pieces, strict=True)]
        self.last_start = self._right[-1]

    def _lay(self, expanded: str, pieces: list[str]) -> list[int]:
        starts, at = [0], len(pieces[0])
        for piece in pieces[1:]:
            start = expanded.find(piece, at + 1)  # + 1: an image takes at least one character
            if start < 0:
                raise _lost(piece, expanded)
            starts.append(start)
            at = start + len(piece)
        return starts

    def char(self, at: int) -> int:
        """The place in `expanded` of a character of `text` that is in no placeholder."""
        for number, (start, piece) in enumerate(zip(self._starts, self._pieces, strict=True)):
            if start <= at <= start + len(piece):
                if number == 0:  # fixed by the beginning of the text, as the last one is by its end
                    return at
                last = number == len(self._pieces) - 1
                if not last and self._left[number] != self._right[number]:
                    raise RowError(
                        f"the text {show(piece, 60)} between two images is found more than once in what the processor "
                        "makes of them, so the assistant's tokens cannot be told from the rest"
                    )
                return self._right[number] + at - start
        raise RowError("an assistant turn begins or ends inside an image placeholder")


def _lost(piece: str, expanded: str) -> RowError:
    return RowError(
        f"the processor changes text besides its images, so the assistant's tokens cannot be told from the rest: "
        f"{show(piece, 80)} is not where it was in {show(expanded, 160)}"
    )

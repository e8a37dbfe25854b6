"""Token weights by visual reliance: how the divergence of a row is spread over its tokens."""

from __future__ import annotations

from fractions import Fraction
from typing import Annotated, Literal

from pydantic import Field

from kdtrain.config.section import Number, Section

_Part = Annotated[Number, Field(gt=0, lt=1)]


class TokenWeights(Section):
    """What each token counts in the divergence of its row (https://arxiv.org/abs/2605.21924)."""

    by: Literal["visual_reliance"] = "visual_reliance"
    """What tokens are ranked by. `visual_reliance`: log p(token | image) - log p(token | image in its mean colour) of
    the teacher, which runs once more for it."""
    top: _Part = 0.2
    """Share of each row's supervised tokens that rank highest, rounded up."""
    share: _Part = 0.5
    """What these count together, of the row's divergence; the others count the rest. A row counts as much as without,
    and one without images is as it was."""

    @property
    def ratio(self) -> tuple[int, int]:
        """`top` as a fraction, to six digits; see `TokenSelection.ratio`."""
        return Fraction(str(self.top)).limit_denominator(10**6).as_integer_ratio()

"""`python -m tests.gradient_table`: what each visual target teaches in each family.

Student and teacher are tiny models with different weights; one forward and backward of the visual term alone.
"""

from __future__ import annotations

from collections.abc import Iterator

from kdtrain.models.layouts import LAYOUTS
from kdtrain.models.parts import part_of
from tests import tiny_vision

PARTS = ("vit", "aligner", "llm")


def rows() -> Iterator[tuple[str, str, dict[str, tuple[int, int]], float, float, int]]:
    """(family, target, part -> parameters (reached, all), loss, gradient norm, parameters reached in the teacher)."""
    for family in tiny_vision.FAMILIES:
        for target in LAYOUTS[family].taps:
            student, teacher = tiny_vision.make_vlm(family, seed=1), tiny_vision.make_vlm(family, seed=2)
            visual = tiny_vision.visual_knobs(target)
            loss = tiny_vision.run_visual(visual, student, teacher, tiny_vision.make_inputs(student))["vision_kd_loss"]
            loss.backward()
            reached = tiny_vision.gradients(student)
            counts = {
                part: (sum(name in reached for name in names), len(names))
                for part, names in ((part, part_of(student, part)) for part in PARTS)
            }
            norm = sum(value**2 for value in reached.values()) ** 0.5
            yield family, target, counts, loss.item(), norm, len(tiny_vision.gradients(teacher))


def main() -> None:
    print(
        f"{'family':<16} {'target':<10}" + "".join(f" {part:>9}" for part in PARTS) + "      loss  grad norm  teacher"
    )
    for family, target, counts, loss, norm, teacher in rows():
        parts = "".join(f" {'{}/{}'.format(*counts[part]):>9}" for part in PARTS)
        print(f"{family:<16} {target:<10}{parts} {loss:9.4f} {norm:10.4f} {teacher:8d}")


if __name__ == "__main__":
    main()

"""Distances between features against references written out in float64."""

import math

import pytest
import torch

from kdtrain.errors import PreflightError
from kdtrain.feature_kd.distance import feature_distance
from kdtrain.feature_kd.grids import Grids


def mse(student, teacher):
    total = sum((s - t) ** 2 for s, t in zip(student.flatten(), teacher.flatten(), strict=True))
    return total / student.numel()


def cosine(student, teacher):
    rows = list(zip(student.reshape(-1, student.shape[-1]), teacher.reshape(-1, teacher.shape[-1]), strict=True))
    return sum(1 - (s @ t) / ((s @ s).sqrt() * (t @ t).sqrt()) for s, t in rows) / len(rows)


def bilinear(grid_HWF, height, width):
    """Pixel centres at (i + ½)/n; beyond the outermost centres the edge is repeated."""
    rows, columns = grid_HWF.shape[:2]

    def weights(size, wanted):
        matrix = torch.zeros(wanted, size, dtype=grid_HWF.dtype)
        for i in range(wanted):
            place = min(max((i + 0.5) * size / wanted - 0.5, 0.0), size - 1.0)
            low = math.floor(place)
            matrix[i, low] += 1 - (place - low)
            matrix[i, min(low + 1, size - 1)] += place - low
        return matrix

    return torch.einsum("ih,jw,hwf->ijf", weights(rows, height), weights(columns, width), grid_HWF)


REFERENCES = {"mse": mse, "cosine": cosine}


def features(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("distance", REFERENCES)
@pytest.mark.parametrize("shape", [(2, 4, 6), (9, 6)])
def test_value_and_gradient_equal_the_reference(distance, shape):
    s, t = features(*shape).requires_grad_(), features(*shape, seed=1).requires_grad_()
    s64 = s.detach().double().requires_grad_()
    expected = REFERENCES[distance](s64, t.detach().double())
    expected.backward()
    loss = feature_distance([s], [t], distance, "vit")
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert torch.allclose(s.grad.double(), s64.grad, rtol=1e-5, atol=1e-7)
    assert t.grad is None


@pytest.mark.parametrize("distance", REFERENCES)
def test_passes_count_by_their_tokens(distance):
    s, t = [features(5, 6), features(3, 6, seed=1)], [features(5, 6, seed=2), features(3, 6, seed=3)]
    expected = REFERENCES[distance](torch.cat(s).double(), torch.cat(t).double())
    assert feature_distance(s, t, distance, "vit").item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("distance", REFERENCES)
def test_half_precision_features_are_compared_in_float32_also_under_autocast(distance):
    s, t = (1e3 * features(4, 4, 8, seed=i, dtype=torch.bfloat16) for i in range(2))
    projector = torch.nn.Linear(8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = feature_distance([s], [t], distance, "vit", projector=projector)
    weight, bias = projector.weight.double(), projector.bias.double()
    expected = REFERENCES[distance](s.double() @ weight.T + bias, t.double())
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)


def test_cosine_of_nearly_equal_features_does_not_drown_in_rounding():
    s = features(4, 64, dtype=torch.float64)
    t = s + 1e-4 * features(4, 64, seed=1, dtype=torch.float64)
    value = feature_distance([s.float()], [t.float()], "cosine", "vit").item()
    assert value == pytest.approx(cosine(s, t).item(), rel=1e-2)
    assert feature_distance([s.float()], [s.float()], "cosine", "vit").item() == 0.0


def test_a_vector_of_zeros_is_at_distance_one_and_has_no_gradient():
    student, teacher = torch.randn(4, 8), torch.randn(4, 8)
    student[1], teacher[2], student[3], teacher[3] = 0, 0, 0, 0
    student.requires_grad_()
    distance = feature_distance([student], [teacher], "cosine", "vit")
    expected = 1 - torch.nn.functional.cosine_similarity(student[0], teacher[0], dim=0)
    assert distance.item() == pytest.approx((expected.item() + 1 + 1 + 0) / 4, rel=1e-5)
    distance.backward()
    assert student.grad[0].abs().sum() > 0
    assert not student.grad[1:].any()


def test_grids_of_as_many_tokens_in_another_shape_are_resized():
    student, teacher = torch.randn(12, 8), torch.randn(12, 8)
    wide, high = Grids([torch.tensor([[1, 2, 6]])]), Grids([torch.tensor([[1, 4, 3]])])
    found = feature_distance(
        [student], [teacher], "mse", "vit", match="interpolate", student_grids=wide, teacher_grids=high
    )
    assert found.item() != pytest.approx((student - teacher).square().mean().item(), rel=1e-3)
    image = teacher.reshape(1, 4, 3, 8).permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(image, (2, 6), mode="bilinear", align_corners=False)
    expected = (student - resized.permute(0, 2, 3, 1).reshape(12, 8)).square().mean()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("distance", REFERENCES)
def test_a_projector_is_taught_with_the_student(distance):
    projector = torch.nn.Linear(6, 10)
    s, t = features(2, 4, 6).requires_grad_(), features(2, 4, 10, seed=1)
    s64, w64, b64 = (x.detach().double().requires_grad_() for x in (s, projector.weight, projector.bias))
    expected = REFERENCES[distance](s64 @ w64.T + b64, t.double())
    expected.backward()
    loss = feature_distance([s], [t], distance, "vit", projector=projector)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for found, wanted in ((s, s64), (projector.weight, w64), (projector.bias, b64)):
        assert torch.allclose(found.grad.double(), wanted.grad, rtol=1e-4, atol=1e-7)


# ---- grids -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distance", REFERENCES)
@pytest.mark.parametrize(("own", "wanted"), [(4, 2), (3, 5), (6, 4)])
def test_the_teachers_square_grid_is_resized_to_the_students(distance, own, wanted):
    s, t = features(2, wanted**2, 3).requires_grad_(), features(2, own**2, 3, seed=1)
    s64 = s.detach().double().requires_grad_()
    resized = [bilinear(x.view(own, own, 3), wanted, wanted) for x in t.double()]
    expected = REFERENCES[distance](s64, torch.stack(resized).flatten(1, 2))
    expected.backward()
    loss = feature_distance([s], [t], distance, "vit", match="interpolate")
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.allclose(s.grad.double(), s64.grad, rtol=1e-4, atol=1e-7)


def in_blocks(grid_THWF, block):
    """Tokens in the order of blocks, by walking over them."""
    frames, height, width = grid_THWF.shape[:3]
    return torch.stack(
        [
            grid_THWF[t, row + i, column + j]
            for t in range(frames)
            for row in range(0, height, block)
            for column in range(0, width, block)
            for i in range(block)
            for j in range(block)
        ]
    )


@pytest.mark.parametrize("blocks", [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_packed_images_and_videos_are_resized_one_by_one_whatever_their_order(blocks):
    """Two passes: two images of different shape, then a video of two frames."""
    ours = [torch.tensor([[1, 4, 4], [1, 2, 6]]), torch.tensor([[2, 4, 2]])]
    theirs = [torch.tensor([[1, 6, 8], [1, 4, 4]]), torch.tensor([[2, 2, 2]])]
    passes = {"s": [], "t": [], "s_rows": [], "t_rows": []}
    seed = 0
    for own, other in zip(ours, theirs, strict=True):
        packed = {name: [] for name in passes}
        for (frames, h, w), (_, teacher_h, teacher_w) in zip(own.tolist(), other.tolist(), strict=True):
            seed += 2
            s, t = features(frames, h, w, 3, seed=seed), features(frames, teacher_h, teacher_w, 3, seed=seed + 1)
            packed["s"].append(in_blocks(s, blocks[0]))
            packed["t"].append(in_blocks(t, blocks[1]))
            packed["s_rows"].append(s.double().reshape(-1, 3))
            packed["t_rows"] += [bilinear(frame, h, w).reshape(-1, 3) for frame in t.double()]
        for name, parts in packed.items():
            passes[name].append(torch.cat(parts))
    for distance, reference in REFERENCES.items():
        expected = reference(torch.cat(passes["s_rows"]), torch.cat(passes["t_rows"]))
        value = feature_distance(
            passes["s"],
            passes["t"],
            distance,
            "vit",
            match="interpolate",
            student_grids=Grids(ours, blocks[0]),
            teacher_grids=Grids(theirs, blocks[1]),
        )
        assert value.item() == pytest.approx(expected.item(), rel=1e-5)


def test_grids_of_patches_fit_merged_tokens():
    """A merger of 2 × 2 here and of 4 × 4 there on the same patches."""
    patches = [torch.tensor([[1, 8, 16], [1, 8, 8]])]
    s, t = features(32 + 16, 3), features(8 + 4, 3, seed=1)
    first, second = bilinear(t[:8].view(2, 4, 3), 4, 8), bilinear(t[8:].view(2, 2, 3), 4, 4)
    expected = mse(s, torch.cat([first.reshape(-1, 3), second.reshape(-1, 3)]))
    grids = Grids(patches)
    value = feature_distance([s], [t], "mse", "aligner", match="interpolate", student_grids=grids, teacher_grids=grids)
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)


def test_interpolation_leaves_equal_grids_as_they_are():
    s, t = features(2, 5, 3), features(2, 5, 3, seed=1)  # 5 tokens are no square, and need not be
    assert feature_distance([s], [t], "mse", "vit", match="interpolate") == feature_distance([s], [t], "mse", "vit")


# ---- errors ----------------------------------------------------------------------------------------------------------


def test_unequal_widths_are_an_error_with_both_shapes_and_what_to_set():
    with pytest.raises(PreflightError, match=r"'vit'.*student.*\(2, 4, 3\).*teacher.*\(2, 4, 5\).*student_module"):
        feature_distance([features(2, 4, 3)], [features(2, 4, 5)], "mse", "vit")


def test_unequal_token_counts_are_an_error_with_both_counts_and_what_to_set():
    with pytest.raises(PreflightError, match=r"'vit'.*\(2, 4, 3\).*\(2, 9, 3\).*8 and 18 tokens.*match: interpolate"):
        feature_distance([features(2, 4, 3)], [features(2, 9, 3)], "mse", "vit")


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        ((2, 4, 3), (2, 17, 3), r"\(2, 4, 3\).*\(2, 17, 3\).*17 tokens.*teacher.*class token"),
        ((2, 4, 3), (3, 9, 3), r"student has 2 images .*teacher 3"),
        ((8, 3), (18, 3), r"needs the grid of every image"),
    ],
)
def test_what_cannot_be_resized_is_an_error(student, teacher, message):
    with pytest.raises(PreflightError, match=message):
        feature_distance([features(*student)], [features(*teacher)], "mse", "vit", match="interpolate")


def test_tokens_that_do_not_lie_on_the_grids_are_an_error():
    grids = Grids([torch.tensor([[1, 4, 4]])])
    with pytest.raises(PreflightError, match=r"teacher's 17 tokens do not lie on .*\(1, 4, 4\)"):
        feature_distance(
            [features(16, 3)],
            [features(17, 3)],
            "mse",
            "vit",
            match="interpolate",
            student_grids=grids,
            teacher_grids=grids,
        )


@pytest.mark.parametrize(("student", "teacher"), [(0, 0), (0, 1), (2, 1)])
def test_modules_that_fired_unequally_often_are_an_error(student, teacher):
    with pytest.raises(PreflightError, match=f"{student} student and {teacher} teacher activations"):
        feature_distance([features(4, 3)] * student, [features(4, 3)] * teacher, "mse", "vit")

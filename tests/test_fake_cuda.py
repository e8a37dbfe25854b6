"""The loss as a GPU would run it, on a machine without one: devices, dtypes and shapes, live bytes, transfers.

The limits on memory are those of 8192 supervised tokens and 151,936 words in bfloat16, beside the head's gradient.
"""

import pytest

from tests import fake_cuda

pytestmark = pytest.mark.skipif(fake_cuda.compiler() is None, reason="needs a C++ compiler")


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return fake_cuda.build(tmp_path_factory.mktemp("fake_cuda"))


def grid(library, step):
    found = fake_cuda.run("grid", library, str(step))
    assert not found["failed"], "\n".join(found["failed"][:20])
    assert not found["elsewhere"], "tensors on the CPU, in code for the device"
    return found["ran"]


def test_every_kind_of_loss_runs_on_a_device(library):
    assert grid(library, 7) > 50  # every seventh: all kinds, and all divergences


@pytest.mark.slow
def test_every_variant_of_the_loss_runs_on_a_device(library):
    assert grid(library, 1) > 390


def check_live_bytes(found):
    gib = {name: one["beside"] / 1024 for name, one in found.items()}
    over_32_bit = gib.pop("float32 weights under autocast")
    frozen = {name: gib.pop(name) for name in list(gib) if "frozen" in name}
    assert all(size <= 1.8 for size in gib.values()), found
    assert all(size <= 1.2 for size in frozen.values()), found
    # Beside a float32 gradient, which is made in place: both heads in half precision, as autocast makes them.
    assert over_32_bit <= 2.9, found
    # One float32 gradient of the head (1,187 MiB), and no second one.
    assert all(sum(size > 1000 for size in one["at_peak"]) <= 1 for name, one in found.items() if name in gib)


def test_live_bytes_beside_the_heads_gradient(library):
    names = ("trained", "frozen", "bias and soft-cap", "odd vocabulary", "float32 weights under autocast")
    names += ("adapter on the head",)
    check_live_bytes(fake_cuda.run("live", library, *names))


@pytest.mark.slow
def test_live_bytes_of_every_kind(library):
    check_live_bytes(fake_cuda.run("live", library))


@pytest.mark.slow
def test_generated_kernels_touch_a_tile_few_times(library):
    found = fake_cuda.run("lowered", library, "0", "0.5")
    assert found["0"]["transfers"] <= 8, found
    assert found["0.5"]["transfers"] <= 11, found
    for one in found.values():
        assert one["transfers"] >= 5, "a loop or a kernel was not recognised"
        assert one["buffers"] == 0, "something of a tile's size is kept between kernels"


@pytest.mark.slow
def test_generated_kernels_of_every_kind_keep_nothing_of_a_tiles_size(library):
    found = fake_cuda.run("lowered", library)
    # α-β reads its kernel's three exponentials from memory: the one kind that keeps a tile.
    assert found.pop("alpha_beta")["buffers"] <= 1
    wide = found.pop("float32")  # over the logits themselves, which is a pass of its own
    assert wide["buffers"] == 0
    assert wide["pointwise"] <= 1
    assert wide["transfers"] <= 11
    assert not {name: one for name, one in found.items() if one["buffers"] or one["pointwise"]}
    assert not {name: one for name, one in found.items() if not 2 <= one["transfers"] <= 11}

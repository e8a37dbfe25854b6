"""The files of a cache: what comes back, in how many bytes, and what is said of files that are damaged."""

import hashlib
import itertools
import os
import resource
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdtrain.errors import DataError
from kdtrain.losses import TopKLogprobs, generalized_jsd, topk_divergence
from kdtrain.losses.head import Head
from kdtrain.losses.sampled import SampledTargets
from kdtrain.teachers.cached import bits
from kdtrain.teachers.cached.hidden_format import exact_kl, kl_bound
from kdtrain.teachers.cached.levels import ERROR, Levels, quantise
from kdtrain.teachers.cached.store import CacheReader, CacheWriter, Format, shard_path
from tests.tiny import slow

VOCABULARIES = {1024: 110, 49152: 155, 151936: 170}
"""With the bytes that a token may take at k = 50, with everything."""


def keys(count):
    return [hashlib.md5(str(i).encode()).digest() for i in range(count)]


def logits(kind, tokens, vocab, seed=0):
    """A teacher's: probabilities that fall as 1/rank, one token that is nearly certain, all alike, or in between."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(tokens, vocab, generator=generator)
    by_rank = -torch.log(torch.arange(1.0, vocab + 1))
    ranks = torch.randperm(vocab, generator=generator).expand(tokens, -1)
    certain = 20.0 * (torch.arange(vocab) == 3)
    return {
        "1/rank": by_rank[ranks] + 0.3 * noise,
        "1/rank³": 3 * by_rank[ranks] + 0.3 * noise,
        "normal": 3 * noise,
        "near flat": noise,
        "certain": certain + 2 * noise,
        "flat": 0 * noise,
    }[kind]


KINDS = ["1/rank", "1/rank³", "normal", "near flat", "certain", "flat"]


def top(teacher, k):
    logprobs, ids = torch.log_softmax(teacher.double(), -1).topk(k)
    return TopKLogprobs(ids, logprobs.float())


def split(targets, lengths):
    ends = list(itertools.accumulate(lengths))
    return [targets[end - length : end] for end, length in zip(ends, lengths, strict=True)]


def written(folder, form, rows, per_shard=4, head=None):
    writer = CacheWriter(folder, form)
    if head is not None:
        writer.write_head(head)
    names = keys(len(rows))
    for number, start in enumerate(range(0, len(rows), per_shard)):
        writer.write_shard(number, names[start : start + per_shard], rows[start : start + per_shard])
    return names


def size(folder):
    return sum(path.stat().st_size for path in folder.glob("shard-*"))


# ---- bits ------------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 2**57 - 1), st.integers(0, 57)), max_size=50), st.integers(1, 57))
def test_numbers_come_back_from_their_bits(numbers, width):
    values = np.array([n for n, _ in numbers], np.int64)
    stream = bits.pack(values & (1 << width) - 1, width)
    assert len(stream) == (len(numbers) * width + 7) // 8
    found = bits.read(
        np.concatenate([stream, bits.SPARE]), bits.places(np.array([0]), np.array([len(values)]), width), width
    )
    assert (found == (values & (1 << width) - 1)).all()
    widths = np.array([w for _, w in numbers], np.int64)
    stream = bits.pack_each(values & (1 << widths) - 1, widths)
    assert len(stream) == (widths.sum() + 7) // 8
    places = bits.places_of_each(np.array([0]), np.array([len(values)]), widths)
    found = bits.read(np.concatenate([stream, bits.SPARE]), places, widths)
    assert (found == (values & (1 << widths) - 1)).all()


@given(st.lists(st.lists(st.integers(0, 40), max_size=20), max_size=6))
def test_numbers_in_unary_come_back_from_several_streams(rows):
    streams = [bits.pack_unary(np.array(row, np.int64)) for row in rows]
    found = bits.read_unary(streams, np.array([len(row) for row in rows], np.int64))
    assert found.tolist() == [number for row in rows for number in row]


# ---- top-k -----------------------------------------------------------------------------------------------------------


@st.composite
def distributions(draw):
    """[N, K] log-probabilities of any shape, some of them missing, with any mass up to 1; and a vocabulary."""
    tokens, k = draw(st.integers(1, 4)), draw(st.integers(1, 12))
    spread = draw(st.sampled_from([0.0, 0.01, 1.0, 10.0, 300.0]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    values = rng.normal(size=(tokens, k)) * spread
    if draw(st.booleans()):
        values = np.round(values)  # ties
    values[rng.random((tokens, k)) < draw(st.sampled_from([0.0, 0.3, 1.0]))] = -np.inf
    peak = np.maximum(values.max(1, keepdims=True), -1e300)
    mass = np.exp(values - peak).sum(1, keepdims=True)
    tail = draw(st.sampled_from([0.0, 1e-9, 1e-4, 0.3, 0.5, 0.9, 1 - 1e-6]))
    logprobs = values - peak - np.log(np.maximum(mass, 1e-300)) + np.log1p(-tail)
    return np.where(np.isfinite(values), np.maximum(logprobs, -9e3), -np.inf).astype(np.float32)


@settings(max_examples=300, deadline=None)
@given(distributions())
def test_every_log_probability_is_within_the_stated_error_and_their_mass_is_kept(logprobs):
    in_order = -np.sort(-logprobs, axis=1)
    levels = quantise(in_order.astype(np.float64))
    found = levels.logprobs()
    there = np.isfinite(in_order)
    assert (np.isfinite(found) == there).all()
    assert np.abs(found[there] - in_order[there]).max(initial=0) <= ERROR == 0.01
    mass, read = (np.exp(x.astype(np.float64)).sum(1) for x in (in_order, found))
    smaller = np.minimum(mass, np.maximum(1 - mass, 0))
    assert (np.abs(read - np.minimum(mass, 1)) <= 1e-5 * smaller + 5e-10).all()
    assert isinstance(levels, Levels)


@settings(max_examples=60, deadline=None)
@given(distributions(), st.integers(12, 40), st.booleans(), st.randoms(use_true_random=False))
def test_top_k_comes_back_with_its_missing_entries(tmp_path_factory, logprobs, vocab, exact, random):
    tokens, k = logprobs.shape
    ids = torch.tensor([random.sample(range(vocab), k) for _ in range(tokens)])
    ids[torch.from_numpy(np.isinf(logprobs)) & (torch.rand(ids.shape) < 0.5)] = -1
    targets = TopKLogprobs(ids, torch.from_numpy(logprobs))
    folder = tmp_path_factory.mktemp("cache")
    form = Format("topk", vocab, k + 1, exact)  # more than the rows have
    names = written(folder, form, [targets[:1], targets[1:]], per_shard=1)
    found = CacheReader(folder).read(names)
    assert found.indices.dtype == torch.int64
    for i in range(tokens):
        entries = {int(t): float(p) for t, p in zip(found.indices[i], found.logprobs[i], strict=True) if t >= 0}
        given = {int(t): float(p) for t, p in zip(ids[i], targets.logprobs[i], strict=True) if t >= 0}
        assert entries.keys() == given.keys()
        for token, value in given.items():
            assert entries[token] == value or abs(entries[token] - value) <= (1e-6 if exact else ERROR)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocab", [1024, 49152, slow(151936)])
def test_a_token_of_top_50_takes_no_more_bytes_than_stated(tmp_path, vocab, kind):
    rows = 8 * split(top(logits(kind, 100 if vocab == 1024 else 50, vocab), 50), [50, 50] if vocab == 1024 else [50])
    written(tmp_path, Format("topk", vocab, 50), rows, 16)
    assert size(tmp_path) / (50 * len(rows)) <= VOCABULARIES[vocab]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gap", [1.0, slow(0.3), 0.05])
def test_losses_of_stored_top_50_are_those_of_the_float32_ones(tmp_path, kind, gap):
    teacher = logits(kind, 400, 1024)
    student = teacher + gap * torch.randn(teacher.shape, generator=torch.Generator().manual_seed(1))
    targets = top(teacher, 50)
    names = written(tmp_path, Format("topk", 1024, 50), split(targets, [100] * 4))
    found = CacheReader(tmp_path).read(names)
    for divergence, beta, tail in itertools.product(
        ["jsd", "jsd_scaled", "mixed_kl"], [0.0, 0.5, 1.0], ["bucket", "renormalize"]
    ):
        expected, stored = (
            topk_divergence(student, t, beta, 1.0, divergence, tail).double().mean() for t in (targets, found)
        )
        assert abs(stored - expected) <= (1e-3 * expected if expected >= 0.05 else 5e-5), (divergence, beta, tail)


def test_at_k_of_the_whole_vocabulary_exact_top_k_is_the_full_divergence(tmp_path):
    teacher = logits("normal", 40, 320)
    names = written(tmp_path, Format("topk", 320, 320, exact=True), split(top(teacher, 320), [15, 25]))
    student = logits("normal", 40, 320, seed=2)
    for beta in (0.0, 0.5, 1.0):
        stored = topk_divergence(student, CacheReader(tmp_path).read(names), beta)
        assert torch.allclose(stored, generalized_jsd(student, teacher, beta), rtol=1e-5, atol=1e-7)


def test_a_small_tail_is_kept_beside_a_large_first_probability(tmp_path):
    logprobs = torch.tensor([[0.9, 0.0989, 1e-4], [0.5, 0.3, 0.1], [1e-3, 1e-4, 1e-5]]).log()
    names = written(tmp_path, Format("topk", 1000, 3), [TopKLogprobs(torch.arange(3).repeat(3, 1), logprobs)])
    found = CacheReader(tmp_path).read(names).logprobs
    tails = [1 - x.double().exp().sum(1) for x in (logprobs, found)]
    assert torch.allclose(*tails, rtol=2e-4)


def test_a_row_in_two_shards_is_refused(tmp_path):
    form = Format("topk", 320, 3)
    names = written(tmp_path, form, split(top(logits("flat", 40, 320), 3), [20, 20]), per_shard=1)
    CacheWriter(tmp_path, form).write_shard(2, names[:1], split(top(logits("flat", 20, 320), 3), [20]))
    with pytest.raises(DataError, match="has a row twice, in two of its shards"):
        CacheReader(tmp_path)


def test_ids_outside_the_vocabulary_and_too_many_entries_are_errors(tmp_path):
    targets = top(logits("normal", 3, 64), 5)
    with pytest.raises(ValueError, match="vocabulary has 20"):
        CacheWriter(tmp_path, Format("topk", 20, 5)).write_shard(0, keys(1), [targets])
    with pytest.raises(ValueError, match="5 entries a token, and the cache's format 4"):
        CacheWriter(tmp_path, Format("topk", 64, 4)).write_shard(0, keys(1), [targets])
    assert not list(tmp_path.iterdir())


# ---- samples ---------------------------------------------------------------------------------------------------------


def drawn(teacher, draws, seed=0):
    tokens = torch.multinomial(
        teacher.softmax(-1), draws, replacement=True, generator=torch.Generator().manual_seed(seed)
    )
    rows = [token.unique(return_counts=True) for token in tokens]
    width = max(len(ids) for ids, _ in rows)
    indices, weights = torch.full((len(rows), width), -1), torch.zeros(len(rows), width)
    for i, (ids, counts) in enumerate(rows):
        indices[i, : len(ids)], weights[i, : len(ids)] = ids, counts / draws
    return SampledTargets(indices, weights)


def shares(targets):
    return [
        {int(t): float(w) for t, w in zip(*row, strict=True) if t >= 0}
        for row in zip(targets.indices, targets.weights, strict=True)
    ]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.sampled_from([0.0, 1.0, 5.0, 30.0]), st.integers(0, 10**6), st.integers(2, 300))
def test_drawn_tokens_and_their_shares_come_back_exactly(tmp_path_factory, draws, spread, seed, vocab):
    teacher = spread * torch.randn(5, vocab, generator=torch.Generator().manual_seed(seed))
    rows = [drawn(teacher[part], draws, seed) for part in (slice(0, 2), slice(2, 3), slice(3, 5))]
    folder = tmp_path_factory.mktemp("cache")
    names = written(folder, Format("sample", vocab, draws), rows, per_shard=2)
    found = CacheReader(folder).read([names[2], names[0], names[1]])
    assert shares(found) == shares(rows[2]) + shares(rows[0]) + shares(rows[1])
    assert (found.weights[found.indices < 0] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocab", [1024, 49152, slow(151936)])
def test_draws_take_three_bytes_each_and_one_a_token(tmp_path, vocab, kind):
    targets = drawn(logits(kind, 50, vocab), 50)
    written(tmp_path, Format("sample", vocab, 50), 60 * [targets], 60)
    assert size(tmp_path) <= 60 * (3 * int((targets.indices >= 0).sum()) + 50)


def test_weights_that_are_no_shares_of_the_draws_are_an_error(tmp_path):
    targets = SampledTargets(torch.tensor([[1, 2]]), torch.tensor([[0.33, 0.67]]))
    with pytest.raises(ValueError, match="not shares of 50 draws"):
        CacheWriter(tmp_path, Format("sample", 9, 50)).write_shard(0, keys(1), [targets])


# ---- hidden states ---------------------------------------------------------------------------------------------------


def hidden_states(tokens, width):
    """As a real model's after its last norm: some channels are far wider than the others, some zero."""
    generator = torch.Generator().manual_seed(0)
    channels = torch.exp(torch.randn(width, generator=generator))
    channels[::37], channels[5] = 25, 0
    return torch.randn(tokens, width, generator=generator) * channels


def a_head(width, vocab=500, **options):
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(vocab, width, generator=generator) * 0.15
    return Head(weight, options.get("bias"), options.get("logit_scale", 1.0), options.get("softcap"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_hidden_states_and_the_head_come_back_bit_for_bit(tmp_path, dtype):
    hidden = hidden_states(30, 64).to(getattr(torch, dtype))
    bias = torch.randn(500)
    bias[490:] = -torch.inf
    head = a_head(64, bias=bias.to(torch.bfloat16), logit_scale=0.7, softcap=30.0)
    form = Format("hidden", 500, hidden_size=64, hidden_dtype=dtype)
    names = written(tmp_path, form, split(hidden, [10, 0, 5, 15]), per_shard=2, head=head)
    reader = CacheReader(tmp_path)
    assert reader.form == form
    found = reader.read(names[::-1])
    assert torch.equal(found.hidden, torch.cat(split(hidden, [10, 0, 5, 15])[::-1]))
    assert found.hidden.dtype == hidden.dtype
    assert torch.equal(reader.head.weight, head.weight)
    assert torch.equal(reader.head.bias, head.bias)
    assert (reader.head.logit_scale, reader.head.softcap) == (0.7, 30.0)


@pytest.mark.parametrize("width", [256, 576, 4096])
def test_eight_bits_take_no_more_than_5_percent_beside_them(tmp_path, width):
    hidden = hidden_states(400, width)
    form = Format("hidden", 500, hidden_size=width, hidden_dtype="int8")
    written(tmp_path, form, split(hidden, [40] * 10), per_shard=10)
    assert size(tmp_path) / 400 <= 1.05 * width


@pytest.mark.parametrize(
    "options",
    [{}, {"logit_scale": 0.5}, {"softcap": 20.0}, {"bias": "with columns that are impossible"}],
    ids=["bare", "scaled", "soft-capped", "biased"],
)
def test_the_kl_of_eight_bits_is_within_its_bound_and_small(tmp_path, options):
    if "bias" in options:
        options = {"bias": torch.randn(500).masked_fill(torch.arange(500) >= 490, -torch.inf)}
    hidden, head = hidden_states(300, 256), a_head(256, **options)
    form = Format("hidden", 500, hidden_size=256, hidden_dtype="int8")
    names = written(tmp_path, form, split(hidden, [100, 100, 100]), head=head)
    found = CacheReader(tmp_path).read(names).hidden
    kl, bound = exact_kl(head, hidden, found), kl_bound(head, hidden, found)
    assert (kl >= -1e-12).all()
    assert (kl <= bound + 1e-12).all()
    assert bound.max() < 0.05
    by_token = (hidden / hidden.abs().amax(1, keepdim=True) * 127).round() * hidden.abs().amax(1, keepdim=True) / 127
    assert kl.mean() < 0.2 * exact_kl(head, hidden, by_token).mean()


@pytest.mark.parametrize("shape", [(1, 1), (3, 40), (2, 79)])
def test_eight_bits_are_within_half_a_step_of_every_entry(tmp_path, shape):
    for scale in (1e-20, 1.0, 1e20):
        folder = tmp_path / str(scale)
        folder.mkdir()
        hidden = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * scale
        form = Format("hidden", 500, hidden_size=shape[1], hidden_dtype="int8")
        names = written(folder, form, [hidden], head=a_head(shape[1]))
        found = CacheReader(folder).read(names).hidden
        step = hidden.abs().amax(0) / 127 * (1 + 2**-7) ** 2
        assert ((found - hidden).abs() <= 0.51 * step).all()


def test_hidden_states_that_are_not_finite_are_an_error(tmp_path):
    form = Format("hidden", 500, hidden_size=4, hidden_dtype="int8")
    with pytest.raises(ValueError, match="NaN or infinite"):
        CacheWriter(tmp_path, form).write_shard(0, keys(1), [torch.tensor([[1.0, 2.0, torch.nan, 0.0]])])


# ---- files -----------------------------------------------------------------------------------------------------------


def a_cache(folder, per_shard=3, rows=7):
    targets = top(logits("normal", 5 * rows, 320), 6)
    names = written(folder, Format("topk", 320, 6), split(targets, [5] * rows), per_shard)
    return names, targets


def test_rows_are_found_by_their_keys_in_any_order(tmp_path):
    names, targets = a_cache(tmp_path)
    reader = CacheReader(tmp_path)
    order = [6, 0, 3, 3, 1]
    found = reader.read([names[i] for i in order])
    rows = split(targets, [5] * 7)
    assert torch.equal(found.indices, torch.cat([rows[i].indices for i in order]))
    assert reader.counts(names) == [5] * 7
    assert len(reader) == 7
    assert names[4] in reader
    assert bytes(16) not in reader
    with pytest.raises(KeyError):
        reader.read([bytes(16)])
    assert len(reader.read([]).indices) == 0


def test_a_shard_is_a_safetensors_file_of_any_reader(tmp_path):
    names, _ = a_cache(tmp_path)
    found = safetensors.numpy.load_file(shard_path(tmp_path, 0))
    assert found["keys"].tobytes() == b"".join(names[:3])
    assert found["counts"].tolist() == [5, 5, 5]
    assert found["ends"][-1] == len(found["data"])


def test_a_shard_that_is_written_again_has_the_same_bytes(tmp_path):
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        a_cache(folder)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_the_bytes_of_a_shard_are_those_of_every_version(tmp_path):
    """A hash of what this version writes: another would make caches unequal that are equal. Raise VERSION with it."""
    logprobs = torch.tensor([[0.6, 0.25, 0.1], [0.05, 0.04, 0.03]], dtype=torch.float64).log().float()
    logprobs[1, 2] = -torch.inf
    targets = TopKLogprobs(torch.tensor([[5, 900, 17], [1, 2, -1]]), logprobs)
    written(tmp_path, Format("topk", 1024, 3), [targets])
    assert hashlib.sha256(shard_path(tmp_path, 0).read_bytes()).hexdigest()[:16] == "8b56be49759e6e52"


@pytest.mark.parametrize("mode", ["topk", "sample", "hidden", "int8"])
def test_any_flipped_bit_is_found_and_named(tmp_path, mode):
    teacher, head = logits("normal", 12, 320), a_head(32, 320)
    form, rows = {
        "topk": (Format("topk", 320, 6), split(top(teacher, 6), [5, 7])),
        "sample": (Format("sample", 320, 50), split(drawn(teacher, 50), [5, 7])),
        "hidden": (
            Format("hidden", 320, hidden_size=32, hidden_dtype="bfloat16"),
            split(hidden_states(12, 32).bfloat16(), [5, 7]),
        ),
        "int8": (Format("hidden", 320, hidden_size=32, hidden_dtype="int8"), split(hidden_states(12, 32), [5, 7])),
    }[mode]
    names = written(tmp_path, form, rows, head=head if "hidden" in form.mode else None)
    for path in sorted(tmp_path.iterdir()):
        whole = path.read_bytes()
        for place in {*range(0, len(whole), 1 + len(whole) // 150), len(whole) - 1}:
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
            with pytest.raises(DataError, match=path.name) as error:
                CacheReader(tmp_path).read(names)
            assert "kdtrain cache" in str(error.value) or "write the cache again" in str(error.value)
        path.write_bytes(whole)
    CacheReader(tmp_path).read(names)


@pytest.mark.parametrize("cut", [0, 5, 8, 100, 700, -1])
def test_a_file_that_was_cut_off_is_found_when_the_cache_is_opened(tmp_path, cut):
    a_cache(tmp_path)
    path = shard_path(tmp_path, 1)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(DataError, match=r"shard-00001.safetensors is damaged.*Delete it and run"):
        CacheReader(tmp_path)
    writer = CacheWriter(tmp_path, Format("topk", 320, 6))
    assert [writer.has_shard(i) for i in range(4)] == [True, False, True, False]


def test_a_file_of_something_else_is_found(tmp_path):
    a_cache(tmp_path)
    safetensors.numpy.save_file({"weight": np.zeros(100)}, shard_path(tmp_path, 9))
    with pytest.raises(DataError, match=r"shard-00009.safetensors is damaged or no file of a cache"):
        CacheReader(tmp_path)


def test_a_shard_of_another_cache_is_found(tmp_path):
    a_cache(tmp_path)
    CacheWriter(tmp_path, Format("topk", 320, 5)).write_shard(5, keys(1), [top(logits("normal", 3, 320), 5)])
    with pytest.raises(DataError, match=r"shard-00005.safetensors is of another cache .* entries 5 and not 6"):
        CacheReader(tmp_path)
    assert not CacheWriter(tmp_path, Format("topk", 320, 6)).has_shard(5)


def test_a_folder_without_shards_and_a_missing_head_are_said(tmp_path):
    with pytest.raises(DataError, match="write one with `kdtrain cache`"):
        CacheReader(tmp_path)
    form = Format("hidden", 500, hidden_size=8, hidden_dtype="float32")
    written(tmp_path, form, [torch.randn(2, 8)])
    with pytest.raises(DataError, match=r"head.safetensors, the teacher's head, is missing"):
        CacheReader(tmp_path)


def test_nothing_is_left_of_a_shard_that_could_not_be_written(tmp_path, monkeypatch):
    names, _ = a_cache(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        CacheWriter(tmp_path, Format("topk", 320, 6)).write_shard(1, names[:1], [top(logits("1/rank", 9, 320), 6)])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_killed_writer_leaves_whole_shards_only(tmp_path):
    form, rows = Format("topk", 320, 50), split(top(logits("normal", 2000, 320), 50), [100] * 20)
    CacheWriter(tmp_path, form).write_shard(0, keys(20), rows)
    for milliseconds in range(1, 60, 3):
        process = os.fork()
        if process == 0:
            while True:
                CacheWriter(tmp_path, form).write_shard(0, keys(20), rows)
        time.sleep(milliseconds / 1000)
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        assert len(CacheReader(tmp_path).read(keys(20)).indices) == 2000
        assert {path.name for path in tmp_path.iterdir()} <= {"shard-00000.safetensors", "shard-00000.safetensors.part"}
    CacheWriter(tmp_path, form).write_shard(0, keys(20), rows)
    assert [path.name for path in tmp_path.iterdir()] == ["shard-00000.safetensors"]


def test_many_shards_need_few_open_files(tmp_path):
    names, _ = a_cache(tmp_path, per_shard=1, rows=120)
    before = len(list(Path("/proc/self/fd").iterdir()))
    reader = CacheReader(tmp_path)
    reader.read(names)
    assert len(list(Path("/proc/self/fd").iterdir())) - before <= 10


def test_reading_a_row_does_not_read_its_shard(tmp_path):
    hidden = torch.zeros(20000, 512)
    form = Format("hidden", 500, hidden_size=512, hidden_dtype="float32")
    names = written(tmp_path, form, split(hidden, [100] * 200), per_shard=200, head=a_head(512))
    reader = CacheReader(tmp_path)
    before = resource.getrusage(resource.RUSAGE_SELF)
    reader.read([names[117]])
    after = resource.getrusage(resource.RUSAGE_SELF)
    # 40 MB are 10,000 pages; a row has 50, and what it is decoded to as many.
    assert after.ru_minflt + after.ru_majflt - before.ru_minflt - before.ru_majflt < 1000

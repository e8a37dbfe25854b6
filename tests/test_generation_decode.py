"""Sampling: the model's distribution, row by row, whatever else is written with it."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from kdtrain.data import Collator
from kdtrain.data.batch import Batch, Rows
from kdtrain.errors import DataError
from kdtrain.generation import batching, generate
from kdtrain.generation import loop as loop_module
from kdtrain.generation.batching import PromptInputs, Room, calls
from kdtrain.generation.call import call_generate
from kdtrain.generation.decode import Draws, NonFiniteLogits, sample
from kdtrain.generation.generate import completions_of_window, row_seeds
from kdtrain.generation.padding import rows_may_leave
from kdtrain.generation.preallocated import PreallocatedLayer
from kdtrain.generation.sampling import generation_config, stable_seed
from tests import tiny
from tests.test_vision_fit import FAMILIES, make_model, picture
from tests.tiny_families import make
from tests.tiny_vision import make_vlm

CPU = torch.device("cpu")


def tiny_llama(vocabulary=6):
    torch.manual_seed(3)
    options = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = {"initializer_range": 0.6, "max_position_embeddings": 64, "pad_token_id": 0}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=vocabulary, **options, **config, bos_token_id=None, eos_token_id=None)
    ).eval()


# ---- the distribution ------------------------------------------------------------------------------------------------


def narrowed(logits, temperature, top_k, top_p, min_p):
    """The probabilities that one token is drawn from, in float64 and by definition."""
    p = (logits.double() / temperature).softmax(-1)
    order = p.argsort(descending=True)
    kept = torch.ones_like(p, dtype=torch.bool)
    if top_k is not None:
        kept[order[top_k:]] = False
        p = p * kept / (p * kept).sum()
    if top_p is not None:
        before = p[order].cumsum(0) - p[order]
        kept[order[before >= top_p]] = False
        p = p * kept / (p * kept).sum()
    if min_p is not None:
        kept[p < min_p * p.max()] = False
    return p * kept / (p * kept).sum()


def distribution(model, prompt, length, stop, **narrowing):
    """The probability of every completion, from forwards without a cache."""
    model = model.double()
    found = {}

    def follow(written, probability):
        if len(written) == length or (written and written[-1] == stop):
            found[tuple(written)] = probability
            return
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*prompt, *written]]), use_cache=False).logits[0, -1]
        for token, p in enumerate(narrowed(logits, **narrowing).tolist()):
            if p > 0:
                follow([*written, token], probability * p)

    follow([], 1.0)
    model.float()
    return found


def assert_drawn_from(samples, expected):
    """χ² of the frequencies, its 99.99 % by Wilson and Hilferty; outcomes expected less than 5 times are one."""
    assert set(map(tuple, samples)) <= expected.keys()
    count = dict.fromkeys(expected, 0)
    for one in samples:
        count[tuple(one)] += 1
    bins = [(count[o], p * len(samples)) for o, p in expected.items() if p * len(samples) >= 5]
    rest = [(count[o], p * len(samples)) for o, p in expected.items() if p * len(samples) < 5]
    if sum(e for _, e in rest) >= 5:
        bins.append(tuple(map(sum, zip(*rest, strict=True))))
    freedom = len(bins) - 1
    statistic = sum((seen - e) ** 2 / e for seen, e in bins)
    limit = freedom * (1 - 2 / (9 * freedom) + 3.72 * (2 / (9 * freedom)) ** 0.5) ** 3
    assert freedom >= 3
    assert statistic < limit, (statistic, freedom)


PLAIN = {"top_k": None, "top_p": None, "min_p": None}
STOP = 5


@pytest.mark.slow
@pytest.mark.parametrize("prompts", [[[1, 2, 3]], [[1, 2, 3], [4], [2, 2, 1, 4, 3, 1], [3, 4]]], ids=["one", "ragged"])
@pytest.mark.parametrize(
    ("temperature", "narrowing"),
    [(1.0, {}), (0.6, {}), (0.9, {"top_k": 3}), (0.9, {"top_p": 0.7}), (0.9, {"min_p": 0.3}),
     (1.0, {"top_k": 4, "top_p": 0.9, "min_p": 0.1})],
)  # fmt: skip
def test_twenty_thousand_draws_follow_the_models_distribution(prompts, temperature, narrowing):
    model, draws = tiny_llama(), 20_000 // len(prompts)
    config = generation_config([STOP], 0, temperature, 3, **narrowing)
    rows = [prompt for prompt in prompts for _ in range(draws)]
    written = sample(model, rows, config, [stable_seed(str(i)) for i in range(len(rows))], CPU)
    for i, prompt in enumerate(prompts):
        expected = distribution(model, prompt, 3, STOP, temperature=temperature, **{**PLAIN, **narrowing})
        assert len(expected) > 8
        assert_drawn_from(written[i * draws : (i + 1) * draws], expected)


def test_a_token_without_probability_is_never_drawn_and_the_ends_are_reached(monkeypatch):
    scores = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).expand(4, -1)
    draws = Draws([0] * 4, 1, CPU)
    draws._uniform_NB = torch.tensor([[0.0, 0.5 - 2**-53, 0.5, 1 - 2**-53]], dtype=torch.float64)
    assert draws(scores, torch.arange(4), 0).tolist() == [1, 1, 3, 3]


def test_rounding_of_the_sum_reaches_no_token_behind_the_last():
    """A thousand thirds: their sum in float32 is not 1."""
    scores = torch.cat([torch.zeros(1, 3000), torch.full((1, 7), -torch.inf)], 1)
    draws = Draws([0], 1, CPU)
    draws._uniform_NB = torch.tensor([[1 - 2**-53]], dtype=torch.float64)
    assert draws(scores, torch.arange(1), 0).tolist() == [2999]


# ---- rows ------------------------------------------------------------------------------------------------------------


def ragged(count, longest=17, vocabulary=320):
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, longest, (count,), generator=generator).tolist()
    return [torch.randint(4, vocabulary, (n,), generator=generator).tolist() for n in lengths]


@pytest.fixture
def widths(monkeypatch):
    """How many rows each forward of a generation has."""
    seen = []
    original = loop_module.Decoding._take

    def noted(self, rows, tokens):
        seen.append(len(rows))
        original(self, rows, tokens)

    monkeypatch.setattr(loop_module.Decoding, "_take", noted)
    return seen


@pytest.mark.parametrize("stops", [[2], [2, *range(4, 70)]], ids=["one stop token", "a list of them"])
def test_a_window_of_ragged_prompts_gets_what_each_row_gets_alone(stops):
    model = tiny.make_qwen3(seed=1).double().eval()
    prompts, seeds = ragged(24), [stable_seed(str(i)) for i in range(24)]
    config = generation_config(stops, 3, 1.0, 10)
    together = sample(model, prompts, config, seeds, CPU)
    assert together == [sample(model, [p], config, [s], CPU)[0] for p, s in zip(prompts, seeds, strict=True)]
    order = list(reversed(range(24)))
    assert sample(model, [prompts[i] for i in order], config, [seeds[i] for i in order], CPU) == together[::-1]
    if len(stops) > 1:
        lengths = {len(one) for one in together}
        assert len(lengths) > 5
        assert 1 in lengths  # stopped by its first token
        assert 10 in lengths  # cut


def test_rows_that_have_stopped_leave_the_batch(widths):
    model = tiny.make_qwen3(seed=1).eval()
    sample(model, [[5]], generation_config([2], 3, 1.0, 1), [0], CPU)
    widths.clear()
    written = sample(model, ragged(24), generation_config(list(range(100)), 3, 1.0, 20), list(range(24)), CPU)
    assert widths[0] == 24
    assert widths == sorted(widths, reverse=True)
    longest = max(map(len, written))
    assert len(widths) == longest  # and no forward behind the last token
    for step in range(1, longest):
        going_on = sum(len(one) > step for one in written)
        assert going_on <= widths[step] <= max(going_on * 8 / 7, 1)


def test_answers_end_behind_the_first_stop_token_where_it_is_the_padding_too():
    model = tiny.make_qwen3(seed=1).double().eval()
    prompts, seeds = ragged(12), list(range(12))
    stops = [2, *range(4, 60)]
    of_pad = sample(model, prompts, generation_config(stops, 2, 1.0, 12), seeds, CPU)
    assert of_pad == sample(model, prompts, generation_config(stops, 3, 1.0, 12), seeds, CPU)
    for one in of_pad:
        assert not set(one[:-1]) & set(stops)
        assert one[-1] in stops or len(one) == 12


def test_greedy_answers_are_those_of_transformers():
    model = tiny.make_qwen3(seed=1).double().eval()
    prompts, config = ragged(6), generation_config(list(range(60)), 3, None, 15)
    made, width = call_generate(model, prompts, config, CPU)
    for one, row in zip(sample(model, prompts, config, [0] * 6, CPU), made[:, width:].tolist(), strict=True):
        assert row[: len(one)] == one
        assert set(row[len(one) :]) <= {3}


def test_an_adapter_writes_and_nothing_else_of_its_model_counts():
    plain, config = tiny.make_qwen3(seed=1).double().eval(), generation_config([2], 3, 1.0, 10)
    prompts, seeds = ragged(6), list(range(6))
    expected = sample(plain, prompts, config, seeds, CPU)
    base = tiny.make_qwen3(seed=1).double()
    base.generation_config.update(repetition_penalty=5.0, no_repeat_ngram_size=1, do_sample=True)
    adapted = get_peft_model(base, tiny.lora_config(rank=2, alpha=64, dropout=0.5)).train()
    assert sample(adapted, prompts, config, seeds, CPU) == expected  # B is 0
    assert adapted.training
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    assert sample(adapted, prompts, config, seeds, CPU) != expected
    assert base.generation_config.repetition_penalty == 5.0


CACHES = ("gemma3", "mamba2", "falcon_h1", "jamba", "qwen3_next", "lfm2", "minimax", "rwkv", "recurrent_gemma",
          "mixtral", "gpt2", "bart_decoder", "deepseek_v3")  # fmt: skip


@pytest.mark.parametrize("family", tiny.one_in(3, CACHES))
def test_rows_that_leave_take_their_part_of_any_cache_with_them(family):
    model = make(family).eval()
    prompts, config = ragged(8, 12), generation_config(list(range(4, 80)), 3, None, 12)
    batch = batch_of(prompts)
    (together,) = completions_of_window(model, [batch], config, seeds=[[0] * 8], room=Room(rows=8))
    alone = [completions_of_window(model, [batch_of([p])], config, seeds=[[0]], room=Room())[0][0] for p in prompts]
    assert together == alone
    assert len({len(one) for one in together}) > 1


@pytest.mark.parametrize("family", ["gemma3", "mamba2", "jamba", "qwen3_next", "qwen3_vl"])
def test_rows_leave_whatever_the_cache_and_the_positions_are(family, widths):
    """Positions of Qwen3-VL are [4, B, T]."""
    model = (make_vlm(family) if family == "qwen3_vl" else make(family)).eval()
    assert rows_may_leave(model, CPU)
    prompts, config = ragged(4, 12, 80), generation_config(list(range(4, 80)), 3, None, 12)
    config.eos_token_id = sorted({one[1] for one in sample(model, prompts[:2], without_stops(config), [0, 0], CPU)})
    alone = [sample(model, [prompt], config, [0], CPU)[0] for prompt in prompts]
    widths.clear()
    assert sample(model, prompts, config, [0] * 4, CPU) == alone
    assert widths[0] == 4 > widths[2]


def without_stops(config):
    return generation_config([], config.pad_token_id, None, config.max_new_tokens)


def batch_of(prompts, **rows):
    width = max(map(len, prompts))
    ids = torch.tensor([[*p, *[3] * (width - len(p))] for p in prompts])
    return Batch(
        model_inputs={"input_ids": ids, "attention_mask": (ids != 3).long()},
        labels=torch.full_like(ids, -100),
        rows=Rows(prompt_lengths=torch.tensor([len(p) for p in prompts]), **rows),
    )


def test_a_preallocated_cache_holds_what_a_growing_one_does():
    model = tiny.make_qwen3(seed=1).double().eval()
    prompts, config = ragged(8), generation_config(list(range(60)), 3, None, 15)
    expected = sample(model, prompts, config, [0] * 8, CPU)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop_module, "preallocate", lambda *_: None)
        assert sample(model, prompts, config, [0] * 8, CPU) == expected
        patch.undo()
        patch.setattr(loop_module, "ROOM_AT_FIRST", 2)
        assert sample(model, prompts, config, [0] * 8, CPU) == expected
    cache = DynamicCache(config=model.config)
    loop_module.preallocate(cache, 9)
    assert all(type(layer) is PreallocatedLayer for layer in cache.layers)
    sliding = DynamicCache(config=make("gemma3").config)
    kinds = [type(layer) for layer in sliding.layers]
    loop_module.preallocate(sliding, 9)
    assert [type(layer) for layer in sliding.layers if type(layer) is not PreallocatedLayer] == [
        kind for kind in kinds if kind.__name__ != "DynamicLayer"
    ]


def test_a_cache_has_room_for_what_a_model_puts_in_front_of_the_prompts(monkeypatch):
    model = get_peft_model(
        tiny.make_qwen3(seed=1), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=9)
    ).eval()
    prompts, config = [[5, 6, 7], [8, 9, 10]], generation_config([2], 3, None, 4)
    found = sample(model, prompts, config, [0, 0], CPU)
    monkeypatch.setattr(loop_module, "preallocate", lambda *_: None)
    assert found == sample(model, prompts, config, [0, 0], CPU)


# ---- windows ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_window_with_images_gets_what_each_row_gets_alone(family):
    processor = FAMILIES[family]()
    model = make_model(family, processor).double().eval()
    question = [{"type": "image"}, {"type": "text", "text": "what?"}]
    longer = [{"type": "text", "text": "please say what this is, in a few words: "}, *question]
    rows = [
        {"images": [picture(i)], "messages": [{"role": "user", "content": longer if i % 2 else question}]}
        for i in range(3)
    ]
    rows.insert(1, {"messages": [{"role": "user", "content": "hello there"}]})
    collate, config = Collator(processor), generation_config([2, *range(4, 60)], 3, 1.0, 6)

    def double(batch):
        return batch.map_tensors(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)

    def written(*batches):
        seeds = [[stable_seed(str(row)) for row in batch] for batch in batches]
        made = [double(collate([rows[row] for row in batch])) for batch in batches]
        return [a for b in completions_of_window(model, made, config, seeds=seeds, room=Room(rows=4)) for a in b]

    alone = [written([i])[0] for i in range(4)]
    assert written([0, 1], [2, 3]) == alone
    assert written([0], [1, 2], [3]) == alone
    assert len({tuple(one) for one in alone}) > 1


def test_images_that_nobody_can_tell_apart_are_refused():
    batch = batch_of([[5, 6], [7, 8]])
    batch = Batch(
        model_inputs={**batch.model_inputs, "pixel_values": torch.zeros(2, 3, 4, 4)},
        labels=batch.labels,
        rows=batch.rows,
    )
    with pytest.raises(DataError, match="not known which entries of pixel_values belong to which row"):
        completions_of_window(make("llama"), [batch], generation_config([2], 3, None, 2), seeds=[[0, 0]], room=Room())


def test_a_row_has_the_same_seed_wherever_it_lies_and_another_one_each_time():
    rows = {"a": [5, 6], "b": [7], "c": [8, 9, 10]}

    def seeds(*names):
        batches = [batch_of([rows[n] for n in batch], ids=list(batch)) for batch in names]
        return {n: s for batch, found in zip(names, row_seeds(batches, "student:0:4"), strict=True)
                for n, s in zip(batch, found, strict=True)}  # fmt: skip

    assert seeds("ab", "c") == seeds("c", "b", "a") == seeds("cab")
    assert len(set(seeds("abc").values())) == 3
    (twice,) = row_seeds([batch_of([[5, 6], [5, 6]], ids=["a", "a"])], "student:0:4")
    assert twice[0] != twice[1]
    (samples,) = row_seeds([batch_of([[5, 6], [5, 6]], ids=["a", "a"], samples=[0, 1])], "student:0:4")
    assert samples[0] != samples[1]
    (unnamed,) = row_seeds([batch_of([[5, 6], [7]])], "student:0:4")
    assert [unnamed[0]] == row_seeds([batch_of([[5, 6]])], "student:0:4")[0]
    assert row_seeds([batch_of([[7]])], "student:0:5") != [unnamed[1:]]


def test_a_row_that_two_ranks_have_gets_two_answers_as_on_one(monkeypatch):
    batch, name = batch_of([[5, 6]], ids=["a"]), "student:0:4"
    both = row_seeds([batch, batch], name)
    monkeypatch.setattr(generate, "PartialState", lambda: SimpleNamespace(process_index=1))
    monkeypatch.setattr(generate, "gather_object", lambda own: [*own, *own])
    assert row_seeds([batch], name) == both[1:]


def lengths(model, prompts, new_tokens, **room):
    inputs = [PromptInputs(ids=[5] * n, seed=0, name="") for n in prompts]
    return [[prompts[i] for _, i in call] for call in calls(model, [inputs], new_tokens, Room(**room), CPU)]


def test_a_call_has_as_many_rows_as_there_is_room_for_the_longest_first(monkeypatch):
    model = tiny.make_qwen3()  # 2 layers, 1 head of 16 for keys and values, float32: 256 bytes a token
    assert batching.cache_bytes(model) == 256
    assert lengths(model, [5, 9, 7, 3], 10) == [[9, 7, 5, 3]]
    assert lengths(model, [5, 9, 7, 3], 10, rows=3) == [[9, 7, 5], [3]]
    of_draw = 24 * model.config.vocab_size
    monkeypatch.setattr(batching, "CALL_BYTES", (256 * (10 + 9) + of_draw) * 2)
    assert lengths(model, [5, 9, 7, 3], 10) == [[9, 7], [5, 3]]
    monkeypatch.setattr(batching, "CALL_BYTES", 100)
    assert lengths(model, [5, 9], 10) == [[9], [5]]
    monkeypatch.setattr(batching, "cache_bytes", lambda model: None)
    assert lengths(model, [5, 9, 7], 10, rows_if_unknown=2) == [[9, 7], [5]]


def groups_of_calls(prompts):
    """The group of each call where each group has so many prompts, by rank, and a call has two."""
    torch.distributed.init_process_group("gloo")
    batching.is_sharded = lambda model: True  # of this process, which ends with the function
    groups = [[PromptInputs(ids=[5], seed=0, name="")] * count for count in prompts[torch.distributed.get_rank()]]
    return [call[0][0] for call in calls(tiny.make_qwen3(), groups, 4, Room(rows=2), CPU)]


def test_ranks_of_a_sharded_model_write_to_the_same_groups_at_the_same_time():
    ranks = tiny.run_ranks(groups_of_calls, 2, [[5, 1, 2], [1, 3, 2]])
    assert ranks == [[0, 0, 0, 1, 1, 2]] * 2


# ---- what is not finite ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("temperature", [None, 1.0], ids=["greedy", "sampled"])
def test_logits_that_are_not_finite_name_their_row(value, temperature):
    model, forwards = tiny.make_qwen3(seed=1).eval(), itertools.count()

    def spoil(module, args, output):
        if next(forwards) == 4:  # the looks have been; the second token of the longest two
            output = output.clone()
            output[1, :, 7] = value
        return output

    config = generation_config([2], 3, temperature, 6)
    sample(model, [[5]], config, [0], CPU)
    model.lm_head.register_forward_hook(spoil)
    forwards = itertools.count(3)
    batch = batch_of([[5, 6, 7], [8], [9, 10]], ids=["a:0", "a:1", "a:2"])
    with pytest.raises(NonFiniteLogits, match="1 new tokens behind the prompt of row a:2"):
        completions_of_window(model, [batch], config, seeds=[[0, 1, 2]], room=Room(rows=3))
    assert sample(model, [[5]], config, [0], CPU)  # nothing of it is left


def test_a_mask_of_some_tokens_is_no_failure():
    model = tiny.make_qwen3(seed=1).eval()
    model.lm_head.register_forward_hook(
        lambda module, args, output: output.index_fill(-1, torch.arange(10, 320), -torch.inf)
    )
    (written,) = sample(model, [[5]], generation_config([2], 3, 1.0, 20), [0], CPU)
    assert max(written) < 10


def test_stop_tokens_may_be_one_number():
    model, config = tiny.make_qwen3(seed=1).eval(), SimpleNamespace(eos_token_id=7, max_new_tokens=3)
    assert loop_module.Decoding(model, 1, config, lambda *_: None, may_leave=True)._stops == {7}

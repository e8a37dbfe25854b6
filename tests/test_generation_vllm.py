"""Answers by vLLM through trl's own class, with a stand-in for the server: what it is sent, and what comes back.

trl's `VLLMGeneration` is the real one, its collectives included. A real vLLM is in `test_server_generation.py`.
"""

import contextlib

import pytest
import torch
from accelerate import Accelerator
from peft import get_peft_model
from trl.generation.vllm_generation import VLLMGeneration

from kdtrain.config.options import GenerationOptions
from kdtrain.errors import NotAvailableError, PreflightError, TeacherError
from kdtrain.generation.sampling import generation_config
from kdtrain.generation.vllm import VllmSampler
from kdtrain.models.named_weights import check_mergeable, named_weights
from kdtrain.trainer import construction
from tests import tiny
from tests.test_distributed import sharding_on_a_cpu
from tests.test_trainer import make_trainer
from tests.tiny import lora_config

STOP, PAD = 2, 3
PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13], [14], [15, 16]]


class Server:
    """In place of trl's client: greedy answers of the weights that it was given."""

    def __init__(self, **model):
        self.model, self.requests, self.syncs = tiny.make_qwen3(seed=99, **model).eval(), [], 0
        self.answer = None

    def update_named_params(self, metadata, named):
        values = {name: value.clone() for name, value in named}
        assert [(n, str(v.dtype).removeprefix("torch."), list(v.shape)) for n, v in values.items()] == metadata
        own = dict(self.model.named_parameters())
        assert list(values) == list(own)  # tied weights once, as vLLM takes them
        with torch.no_grad():
            for name, value in values.items():
                own[name].copy_(value)
        self.syncs += 1

    def reset_prefix_cache(self):
        pass

    def generate(self, prompts, **params):
        self.requests.append((prompts, params))
        if self.answer is not None:
            return self.answer(prompts)
        return replies(prompts, [self._write(ids, params) for ids in prompts])

    def _write(self, ids, params):
        more = params["generation_kwargs"]
        config = generation_config(
            more["stop_token_ids"], PAD, None, params["max_tokens"], [int(i) for i in more.get("logit_bias", {})]
        )
        return self.model.generate(input_ids=torch.tensor([ids]), generation_config=config)[0, len(ids) :].tolist()


def replies(prompts, answers):
    return {"prompt_ids": prompts, "completion_ids": answers, "logprobs": None}


@contextlib.contextmanager
def connected_to(server):
    """trl's class, with a stand-in behind it."""

    def init(self):
        if self.accelerator.is_main_process:
            self.vllm_client = server

    original, VLLMGeneration._init_vllm = VLLMGeneration._init_vllm, init
    try:
        yield server
    finally:
        VLLMGeneration._init_vllm = original


OPTIONS = GenerationOptions(backend="vllm_server", base_url="http://127.0.0.1:9/v1")


def build(model, server):
    with connected_to(server):
        return VllmSampler(OPTIONS, lambda: model, Accelerator(cpu=True), None, rows=4)


def ask(sampler, prompts=PROMPTS, temperature=None, new=6, forbidden=(), **more):
    config = generation_config([STOP], PAD, temperature, new, forbidden, **more)
    return sampler.write(prompts, config, list(range(len(prompts))), [()] * len(prompts))


def greedy(model, prompts, new=6):
    config = generation_config([STOP], PAD, None, new)
    return [
        model.generate(input_ids=torch.tensor([ids]), generation_config=config)[0, len(ids) :].tolist()
        for ids in prompts
    ]


# ---- one process -----------------------------------------------------------------------------------------------------


def test_answers_are_those_of_the_weights_as_they_are_now():
    model = tiny.make_qwen3(seed=1).eval()
    sampler = build(model, server := Server())
    for step in range(2):
        assert ask(sampler) == greedy(model, PROMPTS)
        assert server.syncs == step + 1  # once each time, the check of the first tokens included
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)


def test_what_is_sampled_and_how_is_sent_with_each_window():
    sampler = build(tiny.make_qwen3(seed=1).eval(), server := Server())
    ask(sampler, temperature=0.7, new=5, forbidden=[300, 301], top_p=0.9, top_k=40, min_p=0.05)
    ask(sampler, temperature=1.0, new=9)
    (first, greedily), (prompts, once), (_, again) = server.requests  # the first is the check of the first tokens
    assert first == [[14]]
    assert (greedily["temperature"], greedily["top_k"], greedily["max_tokens"]) == (0.0, 0, 5)
    assert prompts == PROMPTS
    assert {name: once[name] for name in ("n", "temperature", "top_p", "top_k", "min_p", "max_tokens")} == {
        "n": 1, "temperature": 0.7, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "max_tokens": 5,
    }  # fmt: skip
    assert once["generation_kwargs"] == {
        "stop_token_ids": [STOP], "ignore_eos": True, "logit_bias": {300: -100.0, 301: -100.0},
    }  # fmt: skip
    assert (again["temperature"], again["top_p"], again["top_k"], again["min_p"], again["max_tokens"]) == (
        1,
        1,
        0,
        0,
        9,
    )
    assert again["logprobs"] is None
    assert once["repetition_penalty"] == 1.0  # a model's own generation config has no say


def test_a_window_of_more_prompts_than_a_server_takes_is_asked_in_several_requests(monkeypatch):
    monkeypatch.setattr("kdtrain.generation.vllm._PROMPTS_OF_A_REQUEST", 2)
    model = tiny.make_qwen3(seed=1).eval()
    sampler = build(model, server := Server())
    assert ask(sampler) == greedy(model, PROMPTS)
    assert [len(prompts) for prompts, _ in server.requests] == [1, 2, 2, 1]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([7] * 3, "ended an answer after 3 of 6 tokens without a token that ends one"),
        ([], "ended an answer after 0 of 6 tokens"),
        ([7, STOP, 7, 7, 7, 7], "went on behind a token that ends an answer"),
        ([7] * 7, "beyond rlhf.max_new_tokens"),
        ([7, 300, 7, 7, 7, STOP], "wrote token 300, which is none that an answer may have"),
    ],
)
def test_answers_that_are_not_what_was_asked_for_are_refused(answer, message):
    sampler = build(tiny.make_qwen3(seed=1).eval(), server := Server())
    sampler._checked = True
    server.answer = lambda prompts: replies(prompts, [[7] * 6] * (len(prompts) - 1) + [answer])
    with pytest.raises(TeacherError, match=message):
        ask(sampler, forbidden=[300])


def test_an_answer_to_another_prompt_is_refused():
    sampler = build(tiny.make_qwen3(seed=1).eval(), server := Server())
    sampler._checked = True
    server.answer = lambda prompts: replies(prompts[::-1], [[7] * 6] * len(prompts))
    with pytest.raises(TeacherError, match="answered other prompts"):
        ask(sampler)


@pytest.mark.parametrize("what", ["other weights", "another token alone"])
def test_a_server_that_does_not_write_as_the_student_is_refused_at_the_first_window(what):
    sampler = build(tiny.make_qwen3(seed=1).eval(), server := Server())
    server.update_named_params = lambda metadata, named: list(named)  # taken, and not used
    if what == "another token alone":
        server.answer = lambda prompts: replies(prompts, [[200, STOP]] * len(prompts))
    with pytest.raises(PreflightError, match="does not write as the student does, although it was given its weights"):
        ask(sampler)


def test_a_student_that_is_nearly_the_same_in_16_bits_passes_the_check():
    model = tiny.make_qwen3(seed=1).eval()
    sampler = build(model, server := Server())
    taken = server.update_named_params

    def rounded(metadata, named):
        taken(metadata, ((name, value.bfloat16().float()) for name, value in named))

    server.update_named_params = rounded
    assert len(ask(sampler)) == len(PROMPTS)


def test_what_the_server_says_when_it_fails_is_one_readable_line():
    sampler = build(tiny.make_qwen3(seed=1).eval(), server := Server())

    def fails(*args, **kwargs):
        raise Exception('Request failed: 400, {"message": "no\x1b[31m"}')

    generate, sampler._vllm.vllm_client.generate = server.generate, sampler._remembering(fails)
    with pytest.raises(TeacherError, match=r"could not write answers: Request failed: 400.*no\\x1b\[31m") as found:
        ask(sampler)
    assert "\n" not in str(found.value)
    server.generate, server.update_named_params = generate, fails
    with pytest.raises(TeacherError, match=r"could not take the student's weights: Request failed"):
        ask(sampler)


def test_rows_with_images_are_refused():
    sampler = build(tiny.make_qwen3(seed=1).eval(), Server())
    with pytest.raises(NotAvailableError, match="backend: transformers"):
        sampler.write([[5]], generation_config([STOP], PAD, None, 4), [0], [(object(),)])


# ---- weights ---------------------------------------------------------------------------------------------------------


def adapted(**options):
    torch.manual_seed(0)
    model = tiny.make_qwen3(seed=1, tie_word_embeddings=False)
    model = get_peft_model(model, lora_config(rank=4, alpha=8, dropout=0.0, **options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def test_the_weights_with_an_adapter_are_those_of_a_plain_model_and_the_student_keeps_its_own():
    model = adapted(target_modules="all-linear", modules_to_save=["lm_head"])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plain = tiny.make_qwen3(seed=5, tie_word_embeddings=False).eval()
    given = dict(named_weights(model))
    assert list(given) == [name for name, _ in plain.named_parameters()]
    plain.load_state_dict(given)
    ids = torch.arange(5, 30)[None]
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        torch.testing.assert_close(plain(input_ids=ids).logits, expected, atol=1e-4, rtol=0)
    assert (expected - model.get_base_model().eval()(input_ids=ids).logits).abs().max() < 1e-4  # it is the adapter's
    with model.disable_adapter():
        assert (expected - model(input_ids=ids).logits).abs().max() > 0.1
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [({"use_dora": True}, "use_dora"), ({"lora_bias": True}, "lora_bias"), ({"trainable_token_indices": [5]}, "token")],
)
def test_adapters_that_are_more_than_a_product_are_refused(options, message):
    with pytest.raises(NotAvailableError, match=message):
        check_mergeable(adapted(target_modules=["q_proj"], **options), "Or do without.")


# ---- ranks -----------------------------------------------------------------------------------------------------------


def two_ranks(fails):
    """Five prompts on rank 0 and none on rank 1, then two and one."""
    rank = Accelerator(cpu=True).process_index
    model = tiny.make_qwen3(seed=1).eval()
    sampler = build(model, server := Server())
    found = []
    for prompts in ([PROMPTS, []], [PROMPTS[:2], PROMPTS[2:3]], [[], []]):
        found.append((ask(sampler, prompts[rank]), greedy(model, prompts[rank])))
    if fails:
        server.answer = lambda prompts: 1 / 0
        try:
            ask(sampler, PROMPTS[:1])
        except TeacherError as error:
            return str(error), error.between_steps
    return found


def test_ranks_with_different_numbers_of_prompts_get_their_own_answers():
    for found in tiny.run_ranks(two_ranks, 2, False, timeout=60):
        assert [answers for answers, _ in found] == [expected for _, expected in found]


def test_a_server_that_fails_ends_all_ranks():
    first, second = tiny.run_ranks(two_ranks, 2, True, timeout=60)
    assert first == ("vLLM could not write answers: division by zero", True)
    assert second == ("vLLM could not write answers: rank 0 says why", True)


def trained(folder, lora, sharded):
    """Three on-policy windows, each with the check of the first tokens; the losses, and how often it was synced."""
    server, more = Server(), {}
    construction.check_generation = lambda *args: None  # there is no GPU
    if lora:
        more["extra"] = {"peft_config": lora_config(rank=4, alpha=8, dropout=0.0, target_modules="all-linear")}
    if sharded:
        more |= sharding_on_a_cpu()
    with connected_to(server):
        trainer = make_trainer(
            folder, tiny.make_qwen3(seed=1), tiny.make_qwen3(seed=2, hidden=48), lmbda=1.0, generation=OPTIONS,
            max_steps=3, learning_rate=0.05, rows=tiny.CHATS * 2, **more,
        )  # fmt: skip
    write = trainer.sampler.write

    def checked_each_time(*args):
        trainer.sampler._checked = False
        return write(*args)

    trainer.sampler.write = checked_each_time
    trainer.train()
    if lora:
        check_merged(trainer.unwrap(trainer.model))
    return [one["loss"] for one in trainer.state.log_history if "loss" in one], server.syncs


def check_merged(model):
    """Each weight under an adapter is W + 2·B·A of the whole matrices."""
    whole = {
        name: getattr(value, "full_tensor", lambda v=value: v)().detach() for name, value in model.named_parameters()
    }
    given, layers = dict(named_weights(model)), [name for name in whole if name.endswith(".base_layer.weight")]
    assert layers
    for name in layers:
        layer, plain = name.removesuffix("base_layer.weight"), name.removeprefix("base_model.model.")
        delta = 2 * whole[f"{layer}lora_B.default.weight"] @ whole[f"{layer}lora_A.default.weight"]
        assert delta.abs().max() > 1e-3
        torch.testing.assert_close(given[plain.replace(".base_layer", "")], whole[name] + delta, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "lora"])
def test_a_run_gives_its_weights_to_the_server_once_in_each_window(tmp_path, monkeypatch, lora):
    monkeypatch.setattr(construction, "check_generation", None)  # put back after
    losses, syncs = trained(tmp_path, lora, sharded=False)
    assert len(losses) == syncs == 3


@pytest.mark.parametrize("lora", [tiny.slow(False), True], ids=["all weights", "lora"])
def test_under_fsdp2_the_server_gets_whole_weights(tmp_path, lora):
    (losses, syncs), (others, none) = tiny.run_ranks(trained, 2, tmp_path, lora, True, timeout=90)
    assert losses == others
    assert (syncs, none) == (3, 0)  # rank 0 alone speaks to it

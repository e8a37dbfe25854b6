"""What a look at each model before the first step finds, and that it finds nothing where nothing is."""

import functools
import json
import shutil

import pytest
import torch
import transformers as hf
import yaml
from datasets import Dataset
from peft import LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from trl.experimental.gkd import GKDConfig
from trl.experimental.utils import DataCollatorForChatML

from kdtrain.config import ConfigLoader
from kdtrain.data import Collator
from kdtrain.data.batch import Batch, Rows
from kdtrain.errors import DataError, NotAvailableError, PreflightError
from kdtrain.generation import call as generation_call
from kdtrain.generation import decode as generation_decode
from kdtrain.generation import padding as generation_padding
from kdtrain.generation.padding import who_shares_a_batch
from kdtrain.generation.sampling import generation_config
from kdtrain.models.kinds import refuse_other_kinds
from kdtrain.models.loading import load_model
from kdtrain.models.probe import TextLook, look_at_text
from kdtrain.models.processing import load_processing
from kdtrain.preflight.model_checks import CheckedModel, both_sides, check_models, image_findings
from kdtrain.runs.fit import fit
from kdtrain.teachers.local import LocalTeacher
from kdtrain.trainer import GKDTrainerWithMetrics
from tests import tiny
from tests.tiny_families import FAMILIES, SEE_THE_FUTURE, make
from tests.tiny_processors import FAMILIES as PROCESSORS
from tests.tiny_processors import make_llava, make_llava_model, make_model, picture
from tests.tiny_vision import FAMILIES as VISION_FAMILIES
from tests.tiny_vision import make_vlm

CPU = torch.device("cpu")
CAUSAL = [name for name in FAMILIES if name not in SEE_THE_FUTURE]


class Silent:
    """A reporter that says nothing."""

    def data(self, name, report):
        pass

    def answers(self, done, total):
        pass

    def plan(self, rows):
        pass

    def callbacks(self):
        return []

    def close(self):
        pass


def run(project, **changes):
    """`fit` with other settings, as section__option."""
    config = yaml.safe_load((project / "config.yaml").read_text())
    for name, value in changes.items():
        section, option = name.split("__")
        config[section][option] = value
    (project / "changed.yaml").write_text(yaml.safe_dump(config))
    return fit(ConfigLoader.load_training_config(project / "changed.yaml"), Silent())


def put(project, tokenizer, side, model):
    shutil.rmtree(project / side)
    tiny.save_model(model, tokenizer, project / side)


def rows(*lengths):
    """Tokenised rows."""
    return Dataset.from_list(
        [{"input_ids": [5 + i % 200 for i in range(n)], "labels": [5 + i % 200 for i in range(n)]} for n in lengths]
    )


def build(student, tokenizer, folder, train=None, teacher=None, collator=None, evaluation=None, **options):
    """A trainer as a user of the class builds it."""
    settings = {"lmbda": 0.0, "report_to": [], "per_device_train_batch_size": 2, "use_cpu": True, **options}
    args = GKDConfig(output_dir=str(folder), **settings)
    args.llm_kd_weight = 0.0 if teacher is None else 1.0
    return GKDTrainerWithMetrics(
        student,
        teacher_model=teacher,
        args=args,
        data_collator=collator,
        train_dataset=rows(20, 30) if train is None else train,
        eval_dataset=evaluation,
        processing_class=tokenizer,
    )


# ---- models that see the future --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", SEE_THE_FUTURE)
def test_a_model_that_sees_later_tokens_is_found(family):
    (finding,) = look_at_text(make(family), "teacher").findings
    assert finding.level == "error"
    assert "sees the tokens that it has to predict" in finding.message


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", CAUSAL)
def test_a_causal_model_is_not_suspected(family, dtype):
    assert look_at_text(make(family).to(dtype), "student").findings == ()


@pytest.mark.parametrize("family", sorted(VISION_FAMILIES))
def test_a_vision_language_model_is_not_suspected(family):
    assert look_at_text(make_vlm(family, seed=1), "student").findings == ()


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_student_or_teacher_that_sees_the_future_ends_a_run_before_it_begins(project, tokenizer, side):
    put(project, tokenizer, side, make("roformer"))
    with pytest.raises(PreflightError, match=rf"The {side} \(.*{side}, RoFormerForCausalLM\) sees the tokens"):
        run(project)
    assert not list((project / "run").glob("*.safetensors"))


def test_adapters_do_not_hide_a_model_that_sees_the_future(project, tokenizer):
    put(project, tokenizer, "student", make("bert"))
    config = yaml.safe_load((project / "config.yaml").read_text())
    config["tuner"] = {"train_type": "lora", "target_modules": ["query"]}
    (project / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(PreflightError, match="The student"):
        run(project)


def test_a_look_costs_one_forward_and_leaves_a_model_and_the_random_state_as_they_were():
    model = make("qwen3").train()
    forwards = []
    model.register_forward_hook(lambda *_: forwards.append(torch.rand(())))  # as a model that draws
    before = torch.get_rng_state()
    look_at_text(model, "student")
    assert len(forwards) == 1
    assert model.training
    assert model.model.layers[0].training
    assert torch.equal(torch.get_rng_state(), before)


def test_a_model_whose_predictions_depend_on_the_padding_behind_them_is_found():
    model = make("qwen3")

    def add_padding(module, args, kwargs, output):
        output.logits = output.logits + kwargs["attention_mask"].sum(1)[:, None, None]
        return output

    model.register_forward_hook(add_padding, with_kwargs=True)
    (finding,) = look_at_text(model, "student").findings
    assert "does not honour the attention mask: its predictions move by" in finding.message


def test_special_tokens_beyond_the_vocabulary_do_not_disturb_the_look():
    model = make("qwen3")
    model.config.pad_token_id = model.config.eos_token_id = 99999
    assert look_at_text(model, "student").findings == ()
    assert who_shares_a_batch(model, CPU) == "all"


def test_a_model_that_cannot_be_run_is_named_with_its_side():
    model = make("qwen3")
    model.model.layers[1].mlp.up_proj = torch.nn.Linear(7, 64)
    with pytest.raises(PreflightError, match=r"The teacher \(Qwen3ForCausalLM\) cannot be run on a few tokens"):
        look_at_text(model, "teacher")


KINDS = {
    "T5ForConditionalGeneration": (hf.T5Config, "an encoder-decoder model"),
    "BartForConditionalGeneration": (hf.BartConfig, "an encoder-decoder model"),
    "BertForSequenceClassification": (hf.BertConfig, "another head"),
    "LlamaForSequenceClassification": (hf.LlamaConfig, "another head"),
    "RobertaForMaskedLM": (hf.RobertaConfig, "another head"),
    "ElectraForPreTraining": (hf.ElectraConfig, "another head"),
    "DistilBertModel": (hf.DistilBertConfig, "no causal language model"),
    "MusicgenForConditionalGeneration": (hf.MusicgenConfig, "neither one of text nor"),
}


@pytest.mark.parametrize("architecture", KINDS)
def test_other_kinds_of_models_are_refused_by_their_config_before_weights_are_looked_for(tmp_path, architecture):
    kind, said = KINDS[architecture]
    config = kind()
    config.architectures = [architecture]
    config.save_pretrained(tmp_path)  # and no weights
    for load in (load_processing, load_model):
        with pytest.raises(PreflightError, match=said) as caught:
            load(str(tmp_path))
        assert str(tmp_path) in str(caught.value)


def test_configs_of_causal_and_vision_language_models_are_not_refused():
    for family in CAUSAL:
        model = make(family)
        model.config.architectures = [type(model).__name__]
        refuse_other_kinds("folder", model.config)
    for family in VISION_FAMILIES:
        model = make_vlm(family, seed=1)
        model.config.architectures = [type(model).__name__]
        refuse_other_kinds("folder", model.config)


# ---- positions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "opt", "gpt_neo", "biogpt", "roberta_decoder", "bert"])
def test_the_number_of_learned_positions_is_that_of_the_longest_row_that_runs(family):
    model = make(family)
    positions = look_at_text(model, "student").positions
    model(input_ids=torch.full((1, positions), 7))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, positions + 1), 7))


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("family", ["gpt2", "opt", "mpt", "ctrl", "gptj"])
def test_rows_longer_than_the_positions_are_refused_before_the_first_step(tmp_path, tokenizer, family, side):
    models = {"student": make("qwen3"), "teacher": make("qwen3"), side: make(family)}
    with pytest.raises(PreflightError, match=rf"The {side} has 64 positions, and 1 of 2 training rows .* \(up to 70\)"):
        build(models["student"], tokenizer, tmp_path, rows(40, 70), models["teacher"])
    build(models["student"], tokenizer, tmp_path, rows(40, 64), models["teacher"])


@pytest.mark.parametrize("family", ["qwen3", "xglm"])
def test_rows_beyond_what_a_model_was_made_for_are_told_where_it_takes_them(tmp_path, tokenizer, caplog, family):
    student = make(family, max_position_embeddings=64)
    build(student, tokenizer, tmp_path, rows(40, 64))
    assert "was made for" not in caplog.text
    build(student, tokenizer, tmp_path, rows(40, 70))
    assert "The student was made for 64 positions (its config.json), and 1 of 2 training rows have more" in caplog.text


def test_evaluation_rows_generated_answers_and_padding_count_as_well(project, tokenizer):
    short = [chat for chat in tiny.CHATS if len(chat["messages"][1]["content"]) < 20]
    (project / "short.jsonl").write_text("".join(json.dumps(row) + "\n" for row in short * 4))
    put(project, tokenizer, "teacher", make("gpt2", n_positions=47))
    with pytest.raises(PreflightError, match="The teacher has 47 positions, and 4 of 24 evaluation rows have"):
        run(project, data__train="short.jsonl")
    put(project, tokenizer, "teacher", make("gpt2", n_positions=50))
    with pytest.raises(PreflightError, match=r"24 of 24 prompts with an answer of rlhf.max_new_tokens \(40\)"):
        run(project, rlhf__lmbda=1.0, rlhf__max_new_tokens=40)
    with pytest.raises(PreflightError, match=r"24 of 24 prompts with an answer of rlhf.max_new_tokens \(40\)"):
        run(project, rlhf__seq_kd=True, rlhf__max_new_tokens=40)
    with pytest.raises(PreflightError, match=r"24 of 24 prompts with an answer of rlhf.max_new_tokens \(40\)"):
        run(project, rlhf__lmbda=1.0, rlhf__max_new_tokens={"from": 1, "to": 40, "over": 1.0})
    with pytest.raises(PreflightError, match=r"batches are padded to 64 \(training.pad_to_multiple_of\)"):
        run(project, training__pad_to_multiple_of=64)


def test_answers_that_a_teacher_has_no_positions_for_are_refused_before_it_writes(project, tokenizer):
    put(project, tokenizer, "teacher", make("gpt2", n_positions=50))
    source = {"path": "train.jsonl", "answers": "teacher"}
    with pytest.raises(PreflightError, match=r"The teacher has 50 positions, and 24 of 24 prompts with the teacher's"):
        run(project, data__train=source, rlhf__max_new_tokens={"from": 1, "to": 40, "over": 1.0})
    assert not (project / "run" / "teacher_answers").exists()


def test_rows_whose_lengths_nobody_knew_are_refused_before_the_forward_that_would_fail(tmp_path, tokenizer):
    chats = [{"messages": [{"role": role, "content": "word " * 30} for role in ("user", "assistant")]}] * 2
    trainer = build(make("gpt2", n_positions=50), tokenizer, tmp_path, chats, max_steps=1, save_strategy="no")
    with pytest.raises(DataError, match="and the student has 50 positions"):
        trainer.train()


@pytest.mark.parametrize("evaluates", [tiny.slow(False), True])
@pytest.mark.parametrize("own", ["none", "a Collator", "trl's"])
def test_rows_count_as_long_as_the_collator_leaves_them(tmp_path, tokenizer, caplog, own, evaluates):
    collators = {
        "a Collator": Collator(tokenizer, max_length=32, on_overlength="truncate"),
        "trl's": DataCollatorForChatML(tokenizer, max_length=32),
    }
    for student in (make("gpt2", n_positions=64), make("qwen3", max_position_embeddings=64)):
        trainer = build(student, tokenizer, tmp_path, rows(100, 100), max_length=32, collator=collators.get(own),
                        evaluation=rows(100) if evaluates else None, max_steps=1, save_strategy="no")  # fmt: skip
        if own != "trl's":  # which takes chats
            trainer.train()
    assert "positions" not in caplog.text


def test_rows_that_a_collator_drops_do_not_count(tmp_path, tokenizer):
    drop = Collator(tokenizer, max_length=64, on_overlength="drop")
    build(make("gpt2"), tokenizer, tmp_path, rows(20, 70), collator=drop)
    build(make("gpt2"), tokenizer, tmp_path, rows(70, 70), collator=drop)


def test_prompts_count_as_long_as_they_are_cut_and_the_class_is_told_by_its_own_arguments(tmp_path, tokenizer):
    prompts = rows(60, 60).add_column("prompt_length", [50, 50])
    options = {"lmbda": 1.0, "teacher": make("qwen3"), "max_new_tokens": 20}
    build(make("gpt2"), tokenizer, tmp_path, prompts, max_length=44, **options)
    with pytest.raises(PreflightError, match=r"args\.max_new_tokens \(20\) .* lower args\.max_new_tokens or args"):
        build(make("gpt2"), tokenizer, tmp_path, prompts, max_length=45, **options)
    with pytest.raises(PreflightError, match=r"keep within 64 tokens, lower args\.max_length; or take"):
        build(make("gpt2"), tokenizer, tmp_path, rows(100), max_length=80)


VIRTUAL = {"prompt tuning": PromptTuningConfig, "p-tuning": PromptEncoderConfig, "prefix tuning": PrefixTuningConfig}


@pytest.mark.parametrize(
    ("kind", "family"), [*((kind, "gpt2") for kind in VIRTUAL), ("prompt tuning", "gptj"), ("prompt tuning", "mpt")]
)
def test_virtual_tokens_take_positions_from_the_rows(tmp_path, tokenizer, kind, family):
    def tuned():
        more = {"encoder_hidden_size": 16} if kind == "p-tuning" else {}
        return get_peft_model(
            make(family), VIRTUAL[kind](task_type="CAUSAL_LM", num_virtual_tokens=8, num_attention_heads=2, **more)
        )

    short = {"max_steps": 1, "save_strategy": "no", "gradient_checkpointing": False}  # which prefix tuning cannot have
    message = r"has 56 positions behind its 8 virtual tokens, and 1 of 2 training rows .* \(up to 57\)"
    with pytest.raises(PreflightError, match=f"The student {message}"):
        build(tuned(), tokenizer, tmp_path, rows(40, 57))
    build(tuned(), tokenizer, tmp_path, rows(56, 56), **short).train()
    with pytest.raises(PreflightError, match=f"The teacher {message}"):
        build(make("qwen3"), tokenizer, tmp_path, rows(40, 57), tuned())
    chats = [{"messages": [{"role": role, "content": "word " * 4} for role in ("user", "assistant")]}] * 2
    trainer = build(tuned(), tokenizer, tmp_path, chats, **short)
    assert 56 < trainer.data_collator(chats).labels.shape[1] <= 64
    if trainer._positions:
        with pytest.raises(DataError, match="and the student has 56 positions"):
            trainer.train()


# ---- RoPE that looks at the batch ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["phi3", "llama_dynamic"])
def test_the_numbers_of_a_short_row_depend_on_the_row_beside_it(family):
    """Why there is a warning; a plain RoPE is not so."""
    model, short, long = make(family), torch.arange(5, 25)[None], torch.arange(5, 53)[None]
    both = torch.cat([torch.nn.functional.pad(short, (0, 28)), long])
    mask = torch.ones_like(both)
    mask[0, 20:] = 0
    with torch.no_grad():
        alone = model(input_ids=short).logits[0]
        beside = model(input_ids=both, attention_mask=mask).logits[0, :20]
        plain = make("llama")
        beside_it = plain(input_ids=both, attention_mask=mask).logits[0, :20]
        assert torch.allclose(beside_it, plain(input_ids=short).logits, atol=1e-5)
    assert (alone - beside).abs().max() > 1e-3


def test_a_batch_that_mixes_lengths_is_told_for_longrope(tmp_path, tokenizer, caplog):
    said = "2 of 3 training rows have more tokens (up to 45). The numbers of the shorter rows depend on"
    build(make("phi3"), tokenizer, tmp_path, rows(20, 40, 45), make("phi3"))
    assert "The student's positions look at the batch: rope_type longrope has other" in caplog.text
    assert "The teacher's positions look at the batch: rope_type longrope has other" in caplog.text
    assert said in caplog.text
    caplog.clear()
    build(make("phi3"), tokenizer, tmp_path, rows(20, 30, 32), make("phi3"))
    build(make("phi3"), tokenizer, tmp_path, rows(33, 40, 45))
    one_at_a_time = {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1}
    build(make("phi3"), tokenizer, tmp_path, rows(20, 40, 45), **one_at_a_time)
    assert "look at" not in caplog.text


def test_any_row_beyond_the_original_length_is_told_for_dynamic_rope(tmp_path, tokenizer, caplog):
    build(make("llama_dynamic"), tokenizer, tmp_path, rows(20, 32))
    assert "look at" not in caplog.text
    build(make("llama_dynamic"), tokenizer, tmp_path, rows(33, 40), per_device_train_batch_size=1)
    assert "The student's positions look at other rows" in caplog.text
    assert "2 of 2 training rows have more tokens (up to 40)" in caplog.text
    assert "was made for" not in caplog.text  # it is made for more


def test_layers_with_a_rope_of_their_own_are_read_as_well(tmp_path, tokenizer, caplog):
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    plain = {"rope_type": "default", "rope_theta": 1e4}
    student = make(
        "gemma3",
        max_position_embeddings=32,
        rope_parameters={"full_attention": dynamic, "sliding_attention": plain},
        layer_types=["sliding_attention", "full_attention"],
    )
    build(student, tokenizer, tmp_path, rows(20, 40))
    assert "rope_type dynamic" in caplog.text


# ---- padding on the left ---------------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch):
    """The prompts of each call of `generate`."""
    made = []
    original = generation_call.call_generate

    def counted(model, prompts, *args, **kwargs):
        made.append([len(prompt) for prompt in prompts])
        return original(model, prompts, *args, **kwargs)

    for module in (generation_decode, generation_padding):
        monkeypatch.setattr(module, "call_generate", counted)
    return made


def prompts(*lengths):
    ids = torch.full((len(lengths), max(lengths)), 3)
    for row, length in zip(ids, lengths, strict=True):
        row[:length] = torch.arange(20, 20 + length)
    return Batch(
        model_inputs={"input_ids": ids, "attention_mask": (ids != 3).long()},
        labels=torch.full_like(ids, -100),
        rows=Rows(prompt_lengths=torch.tensor(lengths)),
    )


def answers(batch):
    pairs = zip(batch.model_inputs["input_ids"], batch.labels, strict=True)
    return [ids[labels != -100].tolist() for ids, labels in pairs]


@pytest.mark.parametrize("family", ["rwkv", "minimax", "bart_decoder", "recurrent_gemma"])
def test_prompts_that_a_model_cannot_answer_together_are_answered_as_if_alone(family, calls, caplog):
    model, greedy, lengths = make(family), generation_config([], 3, None, 5), (5, 9, 5, 7)
    done = tiny.generate_batch(model, prompts(*lengths), greedy, seed=0)
    together = [[5], [9], [5], [7]] if family == "rwkv" else [[5, 5], [9], [7]]  # RWKV mixes the rows of a batch
    assert calls[-len(together) :] == together
    assert "does not honour padding on the left of a prompt" in caplog.text
    alone = [answers(tiny.generate_batch(model, prompts(length), greedy, seed=0))[0] for length in lengths]
    assert answers(done) == alone


def test_samples_of_prompts_that_are_generated_apart_are_reproducible_and_differ():
    model, config = make("rwkv"), generation_config([], 3, 1.0, 8)
    first, again = (answers(tiny.generate_batch(model, prompts(5, 5), config, seed=1)) for _ in range(2))
    assert first == again
    assert first[0] != first[1]


TOGETHER = ("llama", "gpt2", "opt", "mpt", "bloom", "mixtral", "mamba", "mamba2", "falcon_mamba", "falcon_h1", "bamba",
            "zamba2", "nemotron_h", "lfm2", "jamba", "qwen3_next", "granite_hybrid")  # fmt: skip


@pytest.mark.parametrize("family", TOGETHER)
def test_a_model_that_honours_left_padding_answers_all_prompts_together(family, calls, caplog):
    model = make(family)
    tiny.generate_batch(model, prompts(5, 9), generation_config([], 3, None, 2), seed=0)
    assert calls == [[5, 13], [5], [9, 5]]  # the first two are the look; the longest is written first
    tiny.generate_batch(model, prompts(6, 4), generation_config([], 3, None, 2), seed=0)
    assert calls[3:] == [[6, 4]]
    assert not [record for record in caplog.records if record.name.startswith("kdtrain")]


def test_padding_that_is_read_is_found_even_where_its_embedding_is_still_zero():
    """RecurrentGemma reads padding. A new model's row of zeros hides that, until the tied head has trained it."""
    model, config = make("recurrent_gemma"), generation_config([], 3, None, 5)
    short, long = list(range(20, 25)), list(range(20, 29))
    config.output_logits = config.return_dict_in_generate = True

    def first_logits(*rows):
        return generation_call.call_generate(model, rows, config, CPU)[0].logits[0][0]

    assert torch.allclose(first_logits(short), first_logits(short, long), atol=1e-5)
    torch.nn.init.normal_(model.get_input_embeddings().weight.data[3])
    assert not torch.allclose(first_logits(short), first_logits(short, long), atol=1e-2)
    assert who_shares_a_batch(make("recurrent_gemma"), CPU) == "equally long"


def autocast(model):
    """As accelerate does: within the forward, with float32 logits behind it."""
    original = model.forward

    @functools.wraps(original)
    def forward(*args, **kwargs):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = original(*args, **kwargs)
        output.logits = output.logits.float()
        return output

    model.forward = forward
    return model


def test_rounding_is_that_of_the_type_that_a_model_computes_in():
    def noisy():
        model = make("qwen3")
        model.lm_head.register_forward_hook(
            lambda module, args, out: out + 0.01 * out.roll(1, -1) if len(out) > 1 else out
        )
        return model

    assert who_shares_a_batch(noisy(), CPU) == "none"
    assert who_shares_a_batch(autocast(noisy()), CPU) == "all"
    assert who_shares_a_batch(autocast(make("minimax")), CPU) == "equally long"


def test_a_tie_between_experts_in_one_text_is_no_sign(monkeypatch, caplog):
    same = iter([False, True])
    monkeypatch.setattr(generation_padding, "_is_the_same_text", lambda *_: next(same))
    assert who_shares_a_batch(make("mixtral"), CPU) == "all"
    assert "does not honour" not in caplog.text


def test_prompts_that_cannot_be_generated_apart_are_refused(monkeypatch):
    model = make("rwkv")
    assert who_shares_a_batch(model, CPU) == "none"
    monkeypatch.setattr(generation_padding, "is_sharded", lambda model: True)
    with pytest.raises(PreflightError, match="under FSDP and ZeRO-3 prompts cannot be generated apart"):
        generation_padding.answered_together(model, [[5], [5, 6]], CPU, False)
    monkeypatch.setattr(generation_padding, "is_sharded", lambda model: False)
    with pytest.raises(PreflightError, match="prompts with images cannot be generated apart"):
        generation_padding.answered_together(model, [[5], [5, 6]], CPU, True)
    assert generation_padding.answered_together(model, [[5]], CPU, True) == [[0]]


@pytest.mark.parametrize("changes", [{"rlhf__lmbda": 1.0}, tiny.slow({"rlhf__seq_kd": True})])
def test_a_run_on_answers_of_a_model_that_does_not_honour_padding_says_so_before_training(
    project, tokenizer, caplog, changes
):
    side = "student" if "rlhf__lmbda" in changes else "teacher"
    put(project, tokenizer, side, make("rwkv"))
    run(project, rlhf__max_new_tokens=4, training__max_steps=1, training__eval_strategy="no", **changes)
    assert f"{side} does not honour padding on the left" in caplog.text
    assert caplog.text.count("does not honour") == 1


def test_a_model_that_cannot_write_is_found_before_the_first_step(tmp_path, tokenizer):
    student = make("qwen3")
    student.prepare_inputs_for_generation = None
    with pytest.raises(PreflightError, match="Qwen3ForCausalLM cannot write answers"):
        build(student, tokenizer, tmp_path, teacher=make("qwen3"), lmbda=0.5)
    build(student, tokenizer, tmp_path, teacher=make("qwen3"), lmbda=0.0)


@pytest.mark.parametrize("options", [{"lmbda": 0.5}, {"lmbda": 0.0, "seq_kd": True}])
def test_a_model_that_is_told_what_is_prompt_is_refused_before_the_first_step(tmp_path, tokenizer, options):
    models = [make_vlm("paligemma"), make_vlm("paligemma")]
    with pytest.raises(NotAvailableError, match=r"PaliGemma reads from token_type_ids .* rlhf\.lmbda: 0"):
        build(models[0], tokenizer, tmp_path, teacher=models[1], **options)
    build(models[0], tokenizer, tmp_path, teacher=models[1], lmbda=0.0)


# ---- images ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path):
    """A run on two rows with images by a LLaVA student and teacher."""
    for side, seed in (("student", 1), ("teacher", 2)):
        processor = make_llava()
        make_llava_model(len(processor.tokenizer), seed).save_pretrained(tmp_path / side)
        processor.save_pretrained(tmp_path / side)
    picture().save(tmp_path / "a.png")
    question = [{"type": "image"}, {"type": "text", "text": "what?"}]
    chat = [{"role": "user", "content": question}, {"role": "assistant", "content": "a thing"}]
    (tmp_path / "train.jsonl").write_text((json.dumps({"messages": chat, "images": ["a.png"]}) + "\n") * 2)
    config = {
        "model": {"model": "./student"},
        "data": {"train": "train.jsonl", "max_length": 128},
        "rlhf": {"teacher_model": "./teacher", "lmbda": 0.0},
        "training": {"output_dir": "run", "max_steps": 1, "gradient_checkpointing": False, "save_strategy": "no"},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def forget_additional_tokens(folder):
    path = folder / "processor_config.json"
    settings = json.loads(path.read_text())
    del settings["num_additional_image_tokens"]
    path.write_text(json.dumps(settings))


MISFITS = {
    "size": (lambda folder: make_llava(size=48).save_pretrained(folder), r"pixel_values \[1, 3, 48, 48\] and 36 image"),
    "patch": (lambda folder: make_llava(patch=16).save_pretrained(folder), "and 4 image tokens"),
    "additional": (forget_additional_tokens, "and 15 image tokens"),
}


@pytest.mark.parametrize(
    ("side", "misfit", "source"),
    [
        *(("teacher", name, {}) for name in MISFITS),
        ("student", "size", {"answers": "teacher"}),
        *(tiny.slow("student", name, {}) for name in MISFITS),
        tiny.slow("teacher", "size", {"answers": "teacher"}),
    ],
)
def test_a_processor_that_does_not_fit_its_model_is_told_with_its_side(pictures, side, misfit, source):
    spoil, said = MISFITS[misfit]
    spoil(pictures / side)
    changes = {"data__train": {"path": "train.jsonl", **source}}
    with pytest.raises(PreflightError, match=rf"The {side}'s processor does not fit the {side} .*{said}") as caught:
        run(pictures, **changes)
    other = {"student": "teacher", "teacher": "student"}[side]
    assert f"The {other}'s" not in str(caught.value)
    assert "Its sizes: image_size 32, patch_size 8." in str(caught.value)
    assert not (pictures / "run" / "teacher_answers").exists()


def test_processors_that_fit_are_not_suspected(pictures):
    run(pictures)


@pytest.mark.parametrize("family", sorted(PROCESSORS))
def test_no_familys_own_processor_is_suspected(family):
    processor = PROCESSORS[family]()
    row = {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]},
                        {"role": "assistant", "content": "a thing"}], "images": [picture()]}  # fmt: skip
    model = make_model(family, processor)
    assert image_findings(CheckedModel("student", model, TextLook(), processor), Collator(processor), row) == []


def test_a_look_at_an_image_reads_raw_rows_of_the_class_as_well(tmp_path):
    processor = make_llava(size=48)
    row = {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]},
                        {"role": "assistant", "content": "a thing"}], "images": [picture()]}  # fmt: skip
    with pytest.raises(PreflightError, match="The student's processor does not fit the student"):
        build(make_llava_model(len(processor.tokenizer)), processor, tmp_path, [row, row])


def look_of_both_at(rows, student, teacher):
    """What is asked of both models before the first step, for a run that generates nothing."""
    processor = make_llava()
    collator = Collator(processor)
    sides = both_sides(student, LocalTeacher(teacher), collator)
    check_models(sides, [], collator, rows, generating=())


IMAGE_ROW = {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]},
                          {"role": "assistant", "content": "a thing"}], "images": [picture()]}  # fmt: skip


def test_looks_at_text_and_image_cost_under_two_forwards_of_one_row_of_each_model():
    models = [make_llava_model(len(make_llava().tokenizer), seed) for seed in (1, 2)]
    tokens = {id(model): [] for model in models}
    for model in models:
        model.register_forward_pre_hook(
            lambda module, args, kwargs: tokens[id(module)].append(kwargs["input_ids"].numel()), with_kwargs=True
        )
    look_of_both_at([IMAGE_ROW] * 4, *models)
    row = Collator(make_llava())([IMAGE_ROW]).model_inputs["input_ids"].numel()
    for seen in tokens.values():  # three short texts, four tokens for the teacher's head, and the row
        assert seen[0] == 24
        assert seen.count(row) == 1
        assert sum(seen) < 2 * row


def test_what_looks_at_text_and_image_find_of_both_models_is_one_list():
    student, teacher = (make_llava_model(len(make_llava().tokenizer), seed) for seed in (1, 2))
    teacher.model.language_model.register_forward_hook(see_later_tokens)
    student.model.vision_tower.register_forward_pre_hook(refuse_pixels)
    with pytest.raises(PreflightError, match="2 things stop this run before it begins") as caught:
        look_of_both_at([IMAGE_ROW], student, teacher)
    assert "The teacher (" in str(caught.value)
    assert "sees the tokens that it has to predict" in str(caught.value)
    assert "The student's processor does not fit the student" in str(caught.value)
    assert "The teacher's processor" not in str(caught.value)  # it is not run again


def see_later_tokens(module, args, output):
    output.last_hidden_state = output.last_hidden_state + output.last_hidden_state.mean(1, keepdim=True)
    return output


def refuse_pixels(module, args):
    raise ValueError("these pixels are not for me")


def test_adapters_do_not_disturb_a_look(tmp_path, tokenizer):
    args = GKDConfig(output_dir=str(tmp_path), lmbda=0.5, report_to=[], use_cpu=True)
    GKDTrainerWithMetrics(
        make("qwen3"),
        teacher_model=make("qwen3"),
        args=args,
        train_dataset=rows(20, 30),
        processing_class=tokenizer,
        peft_config=LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"),
    )

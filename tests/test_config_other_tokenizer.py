"""`rlhf.cross_tokenizer` beside other options: what is refused, and what has no effect."""

import pytest

from tests.test_config_rules import config, errors, warnings

ALM = {"rlhf__cross_tokenizer": "alm"}
SERVED = {"backend": "vllm", "base_url": "http://127.0.0.1:1/v1", "model": "t"}
REFUSED = {
    "uld and a cache": (
        {"rlhf__teacher": {"backend": "cache"}, "rlhf__lmbda": 0, "rlhf__cross_tokenizer": "uld"},
        "rlhf.cross_tokenizer",
        "a cache has likelihoods of chunks | use alm",
    ),
    "itself": (
        {"rlhf__teacher": {"backend": "self", "weights": "ema"}},
        "rlhf.cross_tokenizer",
        "the student has its own",
    ),
    "a server without its tokenizer": (
        {"rlhf__teacher": SERVED, "rlhf__teacher_model": None},
        "rlhf.cross_tokenizer",
        "needs the tokenizer of the teacher on the server | name it, rlhf.teacher_model",
    ),
    "uld and a server": (
        {"rlhf__teacher": SERVED, "rlhf__cross_tokenizer": "uld"},
        "rlhf.cross_tokenizer",
        "uld needs distributions over the teacher's whole vocabulary",
    ),
    "seq_kd": ({"rlhf__seq_kd": True}, "rlhf.seq_kd", "not available yet beside rlhf.cross_tokenizer"),
    "answers": (
        {"data__train": {"path": "a.jsonl", "answers": "teacher"}},
        "data.train[0].answers",
        "not available yet",
    ),
    "ranked samples": (
        {"rlhf__select": "best", "rlhf__samples_per_prompt": 2, "rlhf__lmbda": 1.0},
        "rlhf.select",
        "not available yet",
    ),
    "a prefix": (
        {"rlhf__teacher": {"prefix": [{"role": "system", "content": "x"}]}},
        "rlhf.teacher.prefix",
        "not available yet",
    ),
    "images": ({"custom__visual_kd": {"enabled": True}}, "custom.visual_kd", "not available yet"),
    "hidden": ({"custom__hidden_kd": {"enabled": True}}, "custom.hidden_kd", "not available yet"),
    "every token": ({"data__train_on": "all"}, "data.train_on", "which another chat template writes otherwise"),
    "another word": ({"rlhf__cross_tokenizer": "dskd"}, "rlhf.cross_tokenizer", "alm"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_cannot_be_beside_is_refused(name):
    changes, path, message = REFUSED[name]
    assert message in errors(config(**{**ALM, **changes}))[path]


def test_options_of_distributions_have_no_effect_and_are_named_once():
    (warning,) = warnings(config(**ALM, rlhf__divergence="tvd", rlhf__beta=0.1, rlhf__kd_temperature=2.0))
    assert (warning.path, "compares likelihoods of text" in warning.message) == ("rlhf.divergence", True)
    assert "the same goes for beta, kd_temperature" in warning.message
    (tail,) = warnings(config(**ALM, rlhf__teacher={**SERVED, "tail": "renormalize", "top_k": 5}))
    assert (tail.path, "the same goes for top_k" in tail.message) == ("rlhf.teacher.tail", True)
    (own,) = warnings(config(**ALM, data__train={"path": "a.jsonl", "divergence": "tvd", "beta": 0.1}))
    assert own.message.startswith("has no effect: rlhf.cross_tokenizer compares likelihoods of text (the same goes for")
    assert not warnings(config(**ALM))


def test_without_a_divergence_it_has_no_effect():
    found = warnings(config(**ALM, rlhf__llm_kd_weight=0))
    assert "rlhf.cross_tokenizer" in {warning.path for warning in found}

"""What compares rows with their teacher, in words."""

import pytest

from kdtrain.config.in_words import divergence_in_words
from kdtrain.config.load import check_config

SKEW, REVERSE = {"path": "a.jsonl", "divergence": "skew_kl"}, {"path": "b.jsonl", "beta": 1.0}


@pytest.mark.parametrize(
    ("train", "rlhf", "said"),
    [
        ("a.jsonl", {}, "jsd (beta 0, temperature 1)"),
        ([SKEW], {}, "skew_kl (alpha 0.1); temperature 1"),
        ([SKEW, REVERSE], {}, "skew_kl (alpha 0.1) and jsd (beta 1) by source; temperature 1"),
        (
            [SKEW, REVERSE],
            {"lmbda": 0.5, "on_policy": {"divergence": "skew_reverse_kl"}},
            "skew_kl (alpha 0.1) and jsd (beta 1) by source, on the student's own answers skew_reverse_kl (alpha 0.1); "
            "temperature 1",
        ),
        ("a.jsonl", {"lmbda": 1.0, "on_policy": {"divergence": "tvd"}}, "tvd; temperature 1"),
        ("a.jsonl", {"on_policy": {"beta": 1.0}}, "jsd (beta 0, temperature 1)"),
    ],
)
def test_each_divergence_that_trains_rows_is_named(train, rlhf, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = {
        "model": {"model": "org/student"},
        "data": {"train": train},
        "rlhf": {"teacher_model": "org/teacher", "beta": 0.0, "lmbda": 0.0, **rlhf},
        "training": {"output_dir": "run"},
    }
    result = check_config(config)
    assert result.config is not None, result.errors
    assert divergence_in_words(result.config) == said

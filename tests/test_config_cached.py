"""A cache as the teacher: what the static check sees of its folder, and what a cache cannot be asked for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.test_config_rules import config, errors, warnings

TOPK = {"mode": "topk", "vocab_size": 320, "entries": 50, "temperature": 1.0}
SAMPLE = {**TOPK, "mode": "sample", "temperature": 2.0}
CHUNKS = {**TOPK, "mode": "chunks", "vocab_size": 0, "entries": None}
HIDDEN = {**TOPK, "mode": "hidden", "entries": None}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "cache", TOPK)


def write(folder: Path, form: Any, complete: bool = True) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "manifest.json").write_text(json.dumps({"form": form, "complete": complete}))
    return folder


def cached(folder: Path, **changes: Any) -> dict[str, Any]:
    """A good config with this cache as the teacher."""
    teacher = {"rlhf__lmbda": 0.0, "rlhf__teacher": {"backend": "cache", "path": str(folder)}}
    return config(**{**teacher, **changes})


def test_a_complete_cache_at_lmbda_0_is_fine(folder: Path) -> None:
    assert warnings(cached(folder)) == []
    del (alone := cached(folder))["rlhf"]["teacher_model"]
    assert warnings(alone) == []


def test_a_cache_needs_its_path(folder: Path) -> None:
    found = errors(cached(folder, rlhf__teacher={"backend": "cache"}))
    assert list(found) == ["rlhf.teacher.path"]
    assert "set rlhf.teacher.path" in found["rlhf.teacher.path"]


def test_lmbda_must_be_0_also_where_nobody_wrote_it(folder: Path) -> None:
    found = errors({**cached(folder), "rlhf": {"teacher": {"backend": "cache", "path": str(folder)}}})
    assert list(found) == ["rlhf.lmbda"]
    assert (
        "must be 0 (it is 0.5, the default): a cache has no targets for text that does not exist yet"
        in (found["rlhf.lmbda"])
    )
    assert "set rlhf.lmbda: 0, or use the teacher itself" in found["rlhf.lmbda"]
    assert "(it is 0.25)" in errors(cached(folder, rlhf__lmbda=0.25))["rlhf.lmbda"]


@pytest.mark.parametrize(
    ("changes", "option", "message"),
    [
        ({"rlhf__seq_kd": True}, "rlhf.seq_kd", "must be false (it is true): a cache has no targets for text"),
        ({"custom__visual_kd": {"enabled": True}}, "rlhf.teacher.backend", "has no features to compare"),
        ({"custom__hidden_kd": {"enabled": True}}, "rlhf.teacher.backend", "which custom.hidden_kd needs"),
    ],
)
def test_what_a_cache_does_not_have_is_refused(
    folder: Path, changes: dict[str, Any], option: str, message: str
) -> None:
    found = errors(cached(folder, **changes))
    assert list(found) == [option]
    assert message in found[option]


def test_without_a_weight_nothing_is_asked_of_the_cache(tmp_path: Path) -> None:
    changes = {"rlhf__llm_kd_weight": 0, "rlhf__lmbda": 0.5}
    found = warnings(cached(tmp_path / "missing", **changes))
    assert "nothing asks the teacher" in " ".join(one.message for one in found)


def test_the_options_that_say_which_teacher_wrote_it_may_stay(folder: Path) -> None:
    """The same file writes a cache and trains from it: `rlhf.teacher.backend=cache` on the command line."""
    teacher = {
        "backend": "cache", "path": str(folder), "dtype": "bfloat16", "revision": "v2", "adapter": str(folder / "gone"),
        "chat_template_kwargs": {"enable_thinking": True}, "prefix": [{"role": "system", "content": "Be brief."}],
        "prefix_mode": "system", "model": "teacher", "base_url": "http://127.0.0.1:8000/v1", "top_k": 20,
        "api_key_env": "KEY", "timeout_s": 3.0, "weights": "base", "lookahead": 4,
    }  # fmt: skip
    changes = {"rlhf__teacher": teacher, "rlhf__teacher_model_init_kwargs": {"subfolder": "best"}}
    assert warnings(cached(folder, **changes)) == []


# ---- its folder ------------------------------------------------------------------------------------------------------


def test_a_folder_that_is_no_cache_is_an_error_at_its_path(tmp_path: Path) -> None:
    file, empty, incomplete = tmp_path / "file", tmp_path / "empty", write(tmp_path / "half", TOPK, complete=False)
    file.write_text("")
    empty.mkdir()
    expected = {
        tmp_path / "missing": "no such folder: ",
        file: "a file, not the folder of a cache: ",
        empty: "not a cache, it has no manifest.json: ",
        incomplete: "this cache is not complete, its writing was stopped: ",
    }
    for folder, message in expected.items():
        found = errors(cached(folder))
        assert list(found) == ["rlhf.teacher.path"]
        assert found["rlhf.teacher.path"].startswith(f"{message}{folder}")
        assert "kdtrain cache" in found["rlhf.teacher.path"]


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff\xfe", b'{"complete": true}', b'{"form": 3}', b"[" * 100_000], ids=range(7)
)
def test_a_manifest_that_is_damaged_or_of_something_else_is_one_error(folder: Path, content: bytes) -> None:
    (folder / "manifest.json").write_bytes(content)
    found = errors(cached(folder))
    assert list(found) == ["rlhf.teacher.path"]
    assert "cannot be read" in found["rlhf.teacher.path"] or "is not that of a cache" in found["rlhf.teacher.path"]


def test_the_check_of_a_cache_does_without_torch(folder: Path) -> None:
    code = (
        "import sys; from kdtrain.config import check_config; "
        f"result = check_config({cached(folder, rlhf__lmbda=0.5)!r}); "
        "assert [e.path for e in result.errors] == ['rlhf.lmbda']; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- drawn tokens, and the tail --------------------------------------------------------------------------------------


def test_drawn_tokens_serve_forward_kl_at_their_own_temperature_alone(tmp_path: Path) -> None:
    folder = write(tmp_path / "drawn", SAMPLE)
    assert warnings(cached(folder, rlhf__beta=0.0, rlhf__kd_temperature=2.0)) == []
    found = errors(cached(folder))
    assert list(found) == ["rlhf.beta", "rlhf.kd_temperature"]
    assert "must be 0 (it is 0.5, the default)" in found["rlhf.beta"]
    assert "only forward KL can be learnt" in found["rlhf.beta"]
    assert "must be 2 (it is 1): the cache holds tokens that were drawn at 2" in found["rlhf.kd_temperature"]
    assert "(it is 0.1)" in errors(cached(folder, rlhf__beta=0.1, rlhf__kd_temperature=2.0))["rlhf.beta"]


@pytest.mark.parametrize("divergence", ["jsd", "jsd_scaled", "mixed_kl"])
def test_every_divergence_is_forward_kl_at_beta_0(tmp_path: Path, divergence: str) -> None:
    folder = write(tmp_path / "drawn", SAMPLE)
    changes = {"rlhf__beta": 0.0, "rlhf__kd_temperature": 2.0, "rlhf__divergence": divergence}
    assert warnings(cached(folder, **changes)) == []


def test_a_divergence_without_beta_is_refused_for_drawn_tokens(tmp_path: Path) -> None:
    folder = write(tmp_path / "drawn", SAMPLE)
    found = errors(cached(folder, rlhf__kd_temperature=2.0, rlhf__divergence="skew_kl"))
    assert list(found) == ["rlhf.divergence"]
    assert (
        "must be one of jsd, jsd_scaled, mixed_kl (it is skew_kl): the cache holds drawn tokens"
        in found["rlhf.divergence"]
    )


def test_the_tail_is_that_of_the_most_likely_tokens_alone(tmp_path: Path) -> None:
    def about_the_tail(form: Any, tail: str) -> list[str]:
        folder = write(tmp_path / "cache", form)
        teacher = {"backend": "cache", "path": str(folder), "tail": tail}
        changes = {"rlhf__beta": 0.5 if form is not SAMPLE else 0.0, "rlhf__kd_temperature": form["temperature"]}
        found = warnings(cached(folder, rlhf__teacher=teacher, **changes))
        assert all(one.path == "rlhf.teacher.tail" for one in found)
        return [one.message for one in found]

    assert about_the_tail(TOPK, "bucket") == []
    (renormalized,) = about_the_tail(TOPK, "renormalize")
    assert "turns the gradient away" in renormalized
    for form in (HIDDEN, SAMPLE):
        assert about_the_tail(form, "renormalize") == [
            f"has no effect: the cache is of mode {form['mode']}, which leaves nothing out"
        ]


def test_tokens_of_drawn_targets_are_chosen_by_the_student_alone(folder: Path) -> None:
    write(folder, SAMPLE)
    drawn = {"rlhf__beta": 0.0, "rlhf__kd_temperature": 2.0}
    found = errors(cached(folder, **drawn, rlhf__token_selection={"by": "disagreement"}))
    assert list(found) == ["rlhf.token_selection.by"]
    assert "must be student_entropy: the cache holds drawn tokens" in found["rlhf.token_selection.by"]
    assert warnings(cached(folder, **drawn, rlhf__token_selection={"by": "student_entropy"})) == []
    write(folder, HIDDEN)
    assert warnings(cached(folder, rlhf__token_selection={"by": "disagreement"})) == []


def test_a_cache_of_chunks_is_for_a_teacher_with_another_tokenizer_and_no_other_is(folder: Path) -> None:
    found = errors(cached(folder, rlhf__cross_tokenizer="alm"))
    assert "(mode topk), and rlhf.cross_tokenizer compares chunks of text" in found["rlhf.teacher.path"]
    write(folder, CHUNKS)
    assert "must be alm: the cache has likelihoods of chunks" in errors(cached(folder))["rlhf.cross_tokenizer"]
    assert warnings(cached(folder, rlhf__cross_tokenizer="alm")) == []
    del (alone := cached(folder, rlhf__cross_tokenizer="alm"))["rlhf"]["teacher_model"]
    assert warnings(alone) == []
    assert errors(cached(folder, rlhf__llm_kd_weight=0)) == {}
    (tail,) = warnings(cached(folder, rlhf__cross_tokenizer="alm", rlhf__teacher={
        "backend": "cache", "path": str(folder), "tail": "renormalize"}))  # fmt: skip
    assert "mode chunks, which leaves nothing out" in tail.message

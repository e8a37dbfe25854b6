"""Generation by vLLM in a config: what it lacks, what contradicts it, what has no effect."""

from __future__ import annotations

from typing import Any

import pytest

from tests.test_config_rules import config, errors, warnings


def by_vllm(backend: str = "vllm_server", **changes: Any) -> dict[str, Any]:
    address = {"rlhf__generation__base_url": "http://127.0.0.1:8000"} if backend == "vllm_server" else {}
    return config(**{"rlhf__generation__backend": backend, **address, **changes})


@pytest.fixture
def with_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdtrain.config.generation.why_no_vllm", lambda: None)


@pytest.mark.usefixtures("with_vllm")
@pytest.mark.parametrize("backend", ["vllm_server", "vllm_colocate"])
def test_generation_by_vllm_needs_no_more_than_its_address(backend: str) -> None:
    assert warnings(by_vllm(backend)) == []


def test_vllm_that_is_not_installed_is_a_warning_of_the_static_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdtrain.config.generation.find_spec", lambda name: None)
    (found,) = warnings(by_vllm("vllm_colocate"))
    assert "needs vllm 0.22.0 to 0.31.0" in found.message
    assert "it is not installed; kdtrain fit would stop here" in found.message


@pytest.mark.usefixtures("with_vllm")
@pytest.mark.parametrize(
    ("changes", "where", "message"),
    [
        ({"rlhf__generation__base_url": None}, "rlhf.generation.base_url", "a server is needed"),
        ({"rlhf__generation__base_url": "localhost:8000"}, "rlhf.generation.base_url", "begins with http://"),
        ({"rlhf__generation__base_url": "http://h:1?x"}, "rlhf.generation.base_url", "no query"),
        ({"rlhf__temperature": 0.005}, "rlhf.temperature", "0.01 at least"),
        ({"tuner__train_type": "lora", "tuner__use_dora": True}, "tuner.use_dora", "cannot be combined"),
    ],
)
def test_what_vllm_cannot_do_is_an_error(changes: dict[str, Any], where: str, message: str) -> None:
    found = errors(by_vllm(**changes))
    assert list(found) == [where]
    assert message in found[where]


def test_colocated_vllm_reads_no_other_revision() -> None:
    assert "main revision" in errors(by_vllm("vllm_colocate", model__revision="v2"))["rlhf.generation.backend"]


@pytest.mark.usefixtures("with_vllm")
@pytest.mark.parametrize(
    ("teacher", "own", "same"),
    [
        ("http://127.0.0.1:8000/v1", "http://localhost:8000", True),
        ("http://localhost:8000/v1", "http://0.0.0.0:8000/", True),
        ("http://gpu-1/v1", "http://GPU-1:80/v1", True),
        ("http://127.0.0.1:8001/v1", "http://127.0.0.1:8000", False),
        ("http://gpu-1:8000/v1", "http://gpu-2:8000", False),
    ],
)
def test_a_server_that_gets_the_students_weights_is_no_teachers(teacher: str, own: str, same: bool) -> None:
    served = {"backend": "vllm", "model": "teacher", "base_url": teacher}
    changes = {"rlhf__teacher": served, "rlhf__teacher_model": None, "rlhf__generation__base_url": own}
    found = errors(by_vllm(**changes))
    assert list(found) == (["rlhf.generation.base_url"] if same else [])


@pytest.mark.usefixtures("with_vllm")
@pytest.mark.parametrize(
    ("backend", "idle"),
    [
        ("transformers", ["base_url", "max_model_length"]),
        ("vllm_server", ["max_model_length"]),
        ("vllm_colocate", ["base_url"]),
    ],
)
def test_options_of_another_backend_have_no_effect(backend: str, idle: list[str]) -> None:
    generation = {"backend": backend, "base_url": "http://127.0.0.1:8000", "max_model_length": 512}
    found = warnings(config(rlhf__generation=generation))
    assert [one.path for one in found] == [f"rlhf.generation.{name}" for name in idle]


@pytest.mark.usefixtures("with_vllm")
@pytest.mark.parametrize("changes", [{"rlhf__lmbda": 0.0}, {"rlhf__llm_kd_weight": 0.0}])
def test_a_backend_that_writes_nothing_has_no_effect(changes: dict[str, Any]) -> None:
    found = {one.path: one.message for one in warnings(by_vllm("vllm_colocate", **changes))}
    assert "the student writes no answers" in found["rlhf.generation.backend"]

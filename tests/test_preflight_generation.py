"""What keeps vLLM from writing the student's answers, found before a weight is loaded."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import torch

from kdtrain.config.generation import why_no_vllm
from kdtrain.config.options import DistillationOptions
from kdtrain.errors import ConfigError, KdtrainError, NotAvailableError, PreflightError
from kdtrain.preflight import generation
from kdtrain.preflight.generation import check_generation, check_sharding
from tests import tiny
from tests.test_trainer import make_trainer
from tests.tiny_vision import make_vlm

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
GOOD = {"model_config": {"model": "student", "quantization": None}, "weight_transfer_config": {"backend": "nccl"}}


@contextmanager
def server(info=GOOD, columns=320, healthy=True):
    """Says how it was started, and refuses a bias for a token beyond its vocabulary, as vLLM does."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            path = self.path.partition("?")[0]
            replies = {
                "/health": (200 if healthy else 503, {}),
                "/server_info": (404, {}) if info is None else (200, {"vllm_config": info}),
                "/v1/models": (200, {"data": [{"id": "it"}]}),
            }
            self._reply(*replies.get(path, (404, {})))

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert body["model"] == "it"
            self._reply(200 if all(int(token) < columns for token in body["logit_bias"]) else 400, {})

        def _reply(self, status, reply):
            data = json.dumps(reply).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{http.server_port}"
    finally:
        http.shutdown()
        http.server_close()


@pytest.fixture(autouse=True)
def vllm(monkeypatch):
    """As if the environment had one that fits."""
    monkeypatch.setattr(generation, "why_no_vllm", lambda: None)


@pytest.fixture
def config():
    found = tiny.make_qwen3().config
    found._name_or_path = "student"
    return found


def options(backend="vllm_server", lmbda=0.5, **more):
    if backend == "vllm_server":
        more = {"base_url": "http://127.0.0.1:9", "timeout_s": 0.0, **more}
    return DistillationOptions(lmbda=lmbda, generation={"backend": backend, **more})


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
def test_a_server_that_fits_passes(config, caplog, suffix):
    with server() as url:
        check_generation(options(base_url=url + suffix), config, CUDA)
    assert not caplog.records


@pytest.mark.parametrize(
    ("lies", "message"),
    [
        ({"info": None}, "one without VLLM_SERVER_DEV_MODE=1"),
        ({"info": {**GOOD, "weight_transfer_config": None}}, "cannot be given weights. Start it so: VLLM_SERVER_DEV"),
        ({"info": {**GOOD, "weight_transfer_config": {"backend": "ipc"}}}, "cannot be given weights"),
        ({"info": {**GOOD, "model_config": {"quantization": "fp8"}}}, "has a quantised model"),
        ({"columns": 319}, "another vocabulary than the student, whose logits have 320 columns"),
        ({"columns": 321}, "another vocabulary"),
        ({"healthy": False}, r"does not answer after 0 s \(it is not ready\)"),
    ],
)
def test_a_server_that_cannot_be_used_is_refused_with_the_way_out(config, lies, message):
    with server(**lies) as url, pytest.raises(PreflightError, match=message) as found:
        check_generation(options(base_url=url), config, CUDA)
    assert "backend: transformers" in str(found.value)


@pytest.mark.parametrize(
    ("address", "message"),
    [(None, "base_url is missing"), ("http://me:secret@h:1", "user or password"), ("h:1", "begins with http://")],
)
def test_an_address_is_checked_for_the_class_as_for_a_config_and_never_shown(config, address, message):
    with pytest.raises(ConfigError, match=message) as found:
        check_generation(options(base_url=address), config, CUDA)
    assert "secret" not in str(found.value)


def test_no_server_is_a_clear_error(config):
    url = f"http://127.0.0.1:{tiny.free_port()}"
    with pytest.raises(PreflightError, match=r"does not answer after 0\.1 s.*vllm serve MODEL"):
        check_generation(options(base_url=url, timeout_s=0.1), config, CUDA)


def test_a_server_that_was_started_on_a_model_of_another_name_is_warned_of(config, caplog):
    info = {**GOOD, "model_config": {"model": "a\x1b[31mb"}}
    with server(info) as url:
        check_generation(options(base_url=url), config, CUDA)
    assert r"was started on a\x1b[31mb, and the student is student" in caplog.text


@pytest.mark.parametrize("backend", ["vllm_server", "vllm_colocate"])
def test_a_run_without_a_gpu_is_refused_for_its_stale_samples(config, backend):
    with pytest.raises(PreflightError, match=r"needs a CUDA device, and this run is on a CPU.*go on writing with"):
        check_generation(options(backend), config, CPU)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: make_vlm("llava").config, "vision-language students"),
        (lambda config: config.update({"quantization_config": {"load_in_4bit": True}}), "quantised students"),
        (lambda config: config.update({"_name_or_path": ""}), "reads the student from its folder"),
    ],
)
def test_students_that_vllm_cannot_take_are_refused(config, change, message):
    with pytest.raises((NotAvailableError, ConfigError), match=message):
        check_generation(options("vllm_colocate"), change(config) or config, CUDA)


def test_without_vllm_the_run_is_refused(config, monkeypatch):
    monkeypatch.setattr(generation, "why_no_vllm", lambda: "needs vllm: it is not installed")
    with pytest.raises(PreflightError, match=r"vllm_colocate needs vllm: it is not installed\. Install it"):
        check_generation(options("vllm_colocate"), config, CUDA)


@pytest.mark.parametrize(
    ("found", "fits"),
    [("0.21.9", False), ("0.22.0", True), ("0.28.1+cu129", True), ("0.31.0", True), ("0.32.0", False)],
)
def test_the_versions_of_vllm_that_trl_can_give_weights_to(monkeypatch, found, fits):
    monkeypatch.setattr("kdtrain.config.generation.find_spec", lambda name: name)
    monkeypatch.setattr("kdtrain.config.generation.version", lambda name: found)
    reason = why_no_vllm()
    assert (reason is None) is fits
    assert fits or reason.endswith(f"it has {found}")


@pytest.mark.parametrize("more", [{"lmbda": 0.0}, {"backend": "transformers"}])
def test_nothing_is_asked_where_vllm_writes_nothing(config, more):
    check_generation(options(**more), config, CPU)


@pytest.mark.parametrize(
    ("state", "kind"),
    [
        ({"fsdp_plugin": SimpleNamespace(fsdp_version=1)}, "FSDP 1"),
        ({"deepspeed_plugin": SimpleNamespace(zero_stage=3)}, "ZeRO-3"),
        ({"fsdp_plugin": SimpleNamespace(fsdp_version=2)}, None),
        ({"deepspeed_plugin": SimpleNamespace(zero_stage=2)}, None),
    ],
)
def test_weights_in_pieces_that_are_not_put_together_are_refused(state, kind):
    accelerator = SimpleNamespace(state=SimpleNamespace(**state), parallelism_config=None)
    if kind is None:
        check_sharding(accelerator)
    else:
        with pytest.raises(NotAvailableError, match=kind):
            check_sharding(accelerator)


def test_the_class_refuses_it_as_well_and_a_callback_cannot_switch_it_on_later(tmp_path):
    wanted = {"generation": options("vllm_colocate").generation}
    with pytest.raises(PreflightError, match="CUDA device"):
        make_trainer(tmp_path, teacher=tiny.make_qwen3(seed=2, hidden=48), lmbda=1.0, **wanted, **named())
    trainer = make_trainer(tmp_path, teacher=tiny.make_qwen3(seed=2, hidden=48), lmbda=0.0, **wanted)
    trainer.lmbda = 1.0
    with pytest.raises(KdtrainError, match="was built without vLLM"):
        trainer.train()


def named():
    student = tiny.make_qwen3(seed=1)
    student.config._name_or_path = "student"
    return {"student": student}

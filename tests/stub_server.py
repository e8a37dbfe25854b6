"""A server that speaks OpenAI's API as vLLM does, on a real socket, with a tiny model of this process behind it.

    with StubServer(model, tokenizer) as server:
        httpx2.post(server.url + "/completions", json={...})

Replies have the fields of vLLM 0.32 that matter here. Tests make it lie, fail or hang by `on_request` (instead of a
reply) and `on_reply` (changes the true one). Sampling knows `temperature` and `seed`; what it does not know it refuses.
"""

from __future__ import annotations

import contextlib
import functools
import json
import socket
import struct
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

RESET = "reset"
"""Returned by `on_request`: the connection is reset (RST) without a reply."""
HANG = "hang"
"""Returned by `on_request`: nothing is sent until the server stops or the client goes away."""
Raw = tuple[int, Mapping[str, str], "bytes | Iterable[bytes]"]
"""Status, headers and body as they are; the pieces of an iterable are sent one by one, until the connection closes."""
NEUTRAL = {"n": 1, "top_p": 1, "top_k": 0, "stop": [], "min_tokens": 0, "ignore_eos": False, "stream": False}


@dataclass
class Request:
    """What a client sent."""

    path: str
    body: Any
    """Of a GET None."""
    headers: dict[str, str]
    """Names in lower case."""
    time: float
    """`time.monotonic()` at its arrival."""
    connection: int
    """Which of the server's connections it came over, counted from 0."""


@functools.lru_cache(maxsize=2000)
def _logprobs_of(model: Any, version: int, ids: tuple[int, ...]) -> torch.Tensor:
    """[T, V] of a model's weights as they are now: what an answer begins with is asked for again and again.

    Args:
        version: another one where weights were changed in their place.
    """
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        return logits.float().log_softmax(-1)


class Refused(Exception):
    """An error as vLLM answers it."""

    def __init__(self, status: int, message: str, kind: str = "BadRequestError", param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.reply = {"error": {"message": message, "type": kind, "param": param, "code": status}}


class StubServer:
    """See the module. Attributes may be changed while it runs.

    Args:
        model: a causal LM in float32.
        tokenizer: for text, chats and decoded tokens; without one, tokens are called by their ids.
        name: of the model, as `--served-model-name`.
        prompt_logprobs, echo: the two ways to score a prompt; False ignores the field, as many servers do.
        token_ids: `return_token_ids` and `return_tokens_as_token_ids`; False ignores them.
        completions, chat, tokenize: routes; False answers 404.
        max_logprobs: more are refused with 400, as vLLM does.
        delay_s: before each reply, not under the model's lock.
        api_key: wanted as bearer on `/v1`.
        on_request: None goes on; a dict is sent as the reply, `Raw` as it is; or RESET, HANG.
        on_reply: gets the true reply and returns what is sent.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        name: str = "teacher",
        prompt_logprobs: bool = True,
        echo: bool = True,
        token_ids: bool = True,
        completions: bool = True,
        chat: bool = True,
        tokenize: bool = True,
        max_logprobs: int = 400,
        delay_s: float = 0.0,
        api_key: str | None = None,
        on_request: Callable[[Request], Any] | None = None,
        on_reply: Callable[[Request, Any], Any] | None = None,
    ) -> None:
        self.tokenizer, self.name = tokenizer, name
        self.prompt_logprobs, self.echo, self.token_ids = prompt_logprobs, echo, token_ids
        self.completions, self.chat, self.tokenize = completions, chat, tokenize
        self.max_logprobs, self.delay_s, self.api_key = max_logprobs, delay_s, api_key
        self.on_request, self.on_reply = on_request, on_reply
        self.requests: list[Request] = []
        self.most_in_flight = 0
        self.connections = 0
        self.stopping = threading.Event()
        self._in_flight = 0
        self._lock, self._model_lock = threading.Lock(), threading.Lock()
        self._tokenizer_lock = threading.Lock()  # a fast tokenizer fails ("Already borrowed") in two threads at once
        self._open: set[socket.socket] = set()
        self._names: dict[int, str] = {}
        self._port = 0
        self._set_model(model)
        self.start()

    def _set_model(self, model: Any) -> None:
        assert next(model.parameters()).dtype == torch.float32
        self.model = model.eval()

    # --- running ---

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}/v1"

    def start(self) -> None:
        """Listen; after `stop` on the same port."""
        server, self.stopping = self, threading.Event()

        class Handler(_Handler):
            stub = server

        self._http = _HTTPServer(("127.0.0.1", self._port), Handler)
        self._port = self._http.server_address[1]
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """As a server that died: connections are closed, new ones refused."""
        self.stopping.set()
        self._http.shutdown()
        self._http.socket.close()
        self.close_connections()

    def restart(self, model: Any = None) -> None:
        """Close all connections and go on at the same port, with another model where one is given."""
        with self._model_lock:
            self._set_model(self.model if model is None else model)
        self.close_connections()

    def close_connections(self) -> None:
        with self._lock:
            for connection in self._open:
                with contextlib.suppress(OSError):  # closed by the client already
                    connection.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> StubServer:
        return self

    def __exit__(self, *error: object) -> None:
        if not self.stopping.is_set():
            self.stop()

    def asked(self, path: str) -> list[Request]:
        """The requests whose path ends with this."""
        return [request for request in self.requests if request.path.endswith(path)]

    # --- replies ---

    def reply(self, request: Request) -> dict[str, Any]:
        """The true reply to a request."""
        allowed = self.api_key is None or request.headers.get("authorization") == f"Bearer {self.api_key}"
        if request.path.startswith("/v1") and not allowed:
            raise _raw_refusal(401, {"error": "Unauthorized"})
        if request.path == "/v1/models" and request.body is None:
            card = {"id": self.name, "object": "model", "owned_by": "vllm", "root": self.name, "parent": None}
            return {"object": "list", "data": [{**card, "max_model_len": self._max_length()}]}
        routes: dict[str, Any] = {
            "/v1/completions": self._complete if self.completions else None,
            "/v1/chat/completions": self._chat if self.chat else None,
            "/tokenize": self._tokenize if self.tokenize else None,
            "/detokenize": self._detokenize if self.tokenize else None,
        }
        answer = routes.get(request.path)
        if answer is None or request.body is None:
            raise _raw_refusal(404, {"detail": "Not Found"})
        self._check(request.body)
        reply: dict[str, Any] = answer(request.body)
        return reply

    def _check(self, body: Any) -> None:
        if not isinstance(body, dict):
            raise Refused(400, "Input should be a valid dictionary")
        if body.get("model") not in (None, self.name):
            raise Refused(404, f"The model `{body['model']}` does not exist.", "NotFoundError", "model")
        for key, neutral in NEUTRAL.items():
            if body.get(key) not in (None, neutral) and (key, body[key]) != ("top_k", -1):  # 0 or -1 is all
                raise Refused(400, f"the stub does not know {key}: {body[key]!r}", param=key)
        limits = {"logprobs": "sample", "top_logprobs": "sample", "prompt_logprobs": "prompt"}
        for key, kind in limits.items():
            asked = body.get(key)
            if asked is None or (key == "prompt_logprobs" and not self.prompt_logprobs):
                continue
            asked = self.model.config.vocab_size if asked == -1 else int(asked)
            if asked > self.max_logprobs:
                message = f"Requested {kind} logprobs of {asked}, which is greater than max allowed: "
                raise Refused(400, f"{message}{self.max_logprobs}", param=key)

    def _max_length(self) -> int:
        return int(self.model.config.max_position_embeddings)

    def _complete(self, body: dict[str, Any]) -> dict[str, Any]:
        choices, tokens = [], [0, 0]
        for index, ids in enumerate(self._prompts(body.get("prompt"))):
            choice, written = self._choice(body, ids)
            choices.append({"index": index, **choice})
            tokens[0] += len(ids)
            tokens[1] += written
        return {**self._head("cmpl", "text_completion"), "choices": choices, "usage": _usage(*tokens)}

    def _choice(self, body: dict[str, Any], ids: list[int]) -> tuple[dict[str, Any], int]:
        echo, k = bool(body.get("echo")) and self.echo, body.get("logprobs")
        budget = 16 if body.get("max_tokens") is None else body["max_tokens"]
        if budget < 1 and not (body.get("echo") and budget == 0):
            raise Refused(400, f"max_tokens must be at least 1, got {budget}.", param="max_tokens")
        self._check_length(ids, budget)
        # As vLLM: an echo without generation generates one token all the same, and counts it.
        written, finish, stop = self._generate(body, ids, max(budget, 1))
        shown = ([*ids] if echo else []) + (written if budget else [])
        entries: list[Any] = (self._prompt_scores(ids, k) if echo and k is not None else []) if echo else []
        if budget and k is not None:
            entries = entries + self._scores([*ids, *written], range(len(ids), len(ids) + len(written)), k)
        asked = body.get("prompt_logprobs") if self.prompt_logprobs else None
        asked = k if asked is None and echo and self.prompt_logprobs else asked
        with_ids = self.token_ids and bool(body.get("return_token_ids"))
        as_ids = self.token_ids and bool(body.get("return_tokens_as_token_ids"))
        return {
            "text": self._text(shown),
            "logprobs": None if k is None else self._openai_logprobs(shown, entries, as_ids),
            "finish_reason": finish,
            "stop_reason": stop,
            "token_ids": written if with_ids else None,
            "prompt_logprobs": None if asked is None else self._prompt_scores(ids, asked),
            "prompt_token_ids": list(ids) if with_ids else None,
        }, len(written)

    def _chat(self, body: dict[str, Any]) -> dict[str, Any]:
        with self._tokenizer_lock:
            ids = self._render(body)
        k = (body.get("top_logprobs") or 0) if body.get("logprobs") else None
        room = self._max_length() - len(ids)
        budget = body.get("max_completion_tokens") or body.get("max_tokens") or room
        self._check_length(ids, budget)
        written, finish, stop = self._generate(body, ids, budget)
        with_ids = self.token_ids and bool(body.get("return_token_ids"))
        asked = body.get("prompt_logprobs") if self.prompt_logprobs else None
        as_ids = self.token_ids and bool(body.get("return_tokens_as_token_ids"))
        entries = self._scores([*ids, *written], range(len(ids), len(ids) + len(written)), k or 0)
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": self._text(written), "refusal": None, "reasoning": None},
            "logprobs": None if k is None else self._chat_logprobs(written, entries, k, as_ids),
            "finish_reason": finish,
            "stop_reason": stop,
            "token_ids": written if with_ids else None,
        }
        return {
            **self._head("chatcmpl", "chat.completion"),
            "choices": [choice],
            "usage": _usage(len(ids), len(written)),
            "prompt_logprobs": None if asked is None else self._prompt_scores(ids, asked),
            "prompt_token_ids": list(ids) if with_ids else None,
        }

    def _render(self, body: dict[str, Any]) -> list[int]:
        """Token ids of a chat; of content in parts the text alone."""
        messages = [{**message, "content": _text_of(message.get("content"))} for message in body["messages"]]
        text = self.tokenizer.apply_chat_template(
            messages,
            tools=body.get("tools"),
            tokenize=False,
            **{"add_generation_prompt": True, **(body.get("chat_template_kwargs") or {})},
        )
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _tokenize(self, body: dict[str, Any]) -> dict[str, Any]:
        with self._tokenizer_lock:
            if "messages" in body:
                ids = self._render(body)
            else:
                special = body.get("add_special_tokens", True)
                ids = list(self.tokenizer(body["prompt"], add_special_tokens=special)["input_ids"])
        strings = self.tokenizer.convert_ids_to_tokens(ids) if body.get("return_token_strs") else None
        return {"count": len(ids), "max_model_len": self._max_length(), "tokens": ids, "token_strs": strings}

    def _detokenize(self, body: dict[str, Any]) -> dict[str, Any]:
        return {"prompt": self.tokenizer.decode(body["tokens"])}

    def _head(self, prefix: str, kind: str) -> dict[str, Any]:
        return {"id": f"{prefix}-{len(self.requests)}", "object": kind, "created": int(time.time()), "model": self.name}

    def _prompts(self, prompt: Any) -> list[list[int]]:
        if isinstance(prompt, str):
            prompt = [prompt]
        if not isinstance(prompt, list) or not prompt:
            raise Refused(400, "Either prompt or prompt_embeds must be provided and non-empty.", param="prompt")
        if isinstance(prompt[0], int):
            prompt = [prompt]
        with self._tokenizer_lock:
            rows = [self.tokenizer(row)["input_ids"] if isinstance(row, str) else row for row in prompt]
        for row in rows:
            if not row:
                raise Refused(400, "The decoder prompt cannot be empty", param="prompt")
            if max(row) >= self.model.config.vocab_size or min(row) < 0:
                raise Refused(400, f"Token id {max(row)} is out of vocabulary", param="prompt")
        return [list(row) for row in rows]

    def _check_length(self, ids: Sequence[int], budget: int) -> None:
        if len(ids) + budget > self._max_length():
            raise Refused(
                400,
                f"This model's maximum context length is {self._max_length()} tokens. However, you requested {budget} "
                f"output tokens and your prompt contains {len(ids)} input tokens.",
                param="input_tokens",
            )

    # --- the model ---

    def _logprobs(self, ids: Sequence[int]) -> torch.Tensor:
        """[T, V]; row t predicts token t + 1."""
        with self._model_lock:
            version = sum(parameter._version for parameter in self.model.parameters())
            return _logprobs_of(self.model, version, tuple(ids)).clone()

    def _prompt_scores(self, ids: Sequence[int], k: int) -> list[Any]:
        return [None, *self._scores(ids, range(1, len(ids)), k)]

    def _scores(self, ids: Sequence[int], positions: range, k: int) -> list[dict[str, Any]]:
        """For each position the actual token, then the k most likely: k + 1 entries, or k where it is one of them."""
        if not positions:
            return []
        logprobs_TV = self._logprobs(ids)[positions.start - 1 : positions.stop - 1]
        k = logprobs_TV.shape[-1] if k == -1 else k
        actual_T = torch.tensor(ids[positions.start : positions.stop])
        own_T = logprobs_TV.gather(-1, actual_T[:, None])[:, 0]
        ranks_T = (logprobs_TV > own_T[:, None]).sum(-1) + 1
        top = logprobs_TV.topk(k, -1)
        rows = zip(
            actual_T.tolist(), own_T.tolist(), ranks_T.tolist(), top.indices.tolist(), top.values.tolist(), strict=True
        )
        found = []
        for actual, own, rank, indices, values in rows:
            entries = {str(actual): self._entry(actual, own, rank)}
            for place, (index, value) in enumerate(zip(indices, values, strict=True), start=1):
                entries.setdefault(str(index), self._entry(index, value, place))
            found.append(entries)
        return found

    def _entry(self, token: int, logprob: float, rank: int) -> dict[str, Any]:
        return {"logprob": max(logprob, -9999.0), "rank": rank, "decoded_token": self._name(token)}

    def _name(self, token: int) -> str:
        if token not in self._names:
            self._names[token] = f"<{token}>" if self.tokenizer is None else self.tokenizer.decode([token])
        return self._names[token]

    def _text(self, ids: Sequence[int]) -> str:
        if self.tokenizer is None:
            return "".join(map(self._name, ids))
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def _generate(self, body: dict[str, Any], ids: list[int], budget: int) -> tuple[list[int], str, int | None]:
        """The answer with its last token, why it ended, and by which of `stop_token_ids`."""
        temperature = 1.0 if body.get("temperature") is None else body["temperature"]
        generator = torch.Generator()
        generator.manual_seed(body["seed"]) if body.get("seed") is not None else generator.seed()
        stops = set(body.get("stop_token_ids") or [])
        written: list[int] = []
        while len(written) < budget:
            logprobs_V = self._logprobs([*ids, *written])[-1]
            if temperature == 0:
                token = int(logprobs_V.argmax())
            else:
                token = int(torch.multinomial((logprobs_V / temperature).softmax(-1), 1, generator=generator))
            written.append(token)
            if token in self._end_ids():
                return written, "stop", None
            if token in stops:
                return written, "stop", token
        return written, "length", None

    def _end_ids(self) -> set[int]:
        end = self.model.generation_config.eos_token_id
        return set() if end is None else {end} if isinstance(end, int) else set(end)

    # --- OpenAI's forms ---

    def _openai_logprobs(self, shown: Sequence[int], entries: Sequence[Any], as_ids: bool) -> dict[str, Any]:
        tokens = [_called(as_ids, str(token), self._name(token)) for token in shown]
        offsets = [sum(map(len, tokens[:index])) for index in range(len(tokens))]
        tops = [
            row and {_called(as_ids, token, entry["decoded_token"]): entry["logprob"] for token, entry in row.items()}
            for row in entries
        ]
        own = [row and row[str(token)]["logprob"] for token, row in zip(shown, entries, strict=False)]
        return {"text_offset": offsets, "token_logprobs": own, "tokens": tokens, "top_logprobs": tops}

    def _chat_logprobs(self, written: Sequence[int], entries: Sequence[Any], k: int, as_ids: bool) -> dict[str, Any]:
        def entry(token: str, found: Any) -> dict[str, Any]:
            called = _called(as_ids, token, found["decoded_token"])
            return {"token": called, "logprob": found["logprob"], "bytes": list(called.encode())}

        content = [
            {
                **entry(str(token), row[str(token)]),
                "top_logprobs": [entry(name, found) for name, found in list(row.items())[:k]],
            }
            for token, row in zip(written, entries, strict=True)
        ]
        return {"content": content}


def _called(as_ids: bool, token: str, name: str) -> str:
    return f"token_id:{token}" if as_ids else name


def _usage(prompt: int, completion: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "total_tokens": prompt + completion, "completion_tokens": completion}


def _text_of(content: Any) -> Any:
    if not isinstance(content, list):
        return content
    return "".join(part.get("text", "") for part in content)


def _raw_refusal(status: int, reply: dict[str, Any]) -> Refused:
    refused = Refused(status, "")
    refused.reply = reply
    return refused


class _HTTPServer(ThreadingHTTPServer):
    daemon_threads = True

    def shutdown_request(self, request: Any) -> None:
        """Without the FIN that would go before a reset."""
        self.close_request(request)


class _Handler(BaseHTTPRequestHandler):
    stub: StubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1

    def log_message(self, *args: Any) -> None:
        """Nothing on stderr."""

    def setup(self) -> None:
        super().setup()
        with self.stub._lock:
            self.number, self.stub.connections = self.stub.connections, self.stub.connections + 1
            self.stub._open.add(self.connection)

    def finish(self) -> None:
        with self.stub._lock:
            self.stub._open.discard(self.connection)
        with contextlib.suppress(OSError):  # the client went away
            super().finish()

    def handle(self) -> None:
        try:
            super().handle()
        except (OSError, ValueError):
            self.close_connection = True  # the client went away, or the connection was closed from outside

    def do_GET(self) -> None:
        self._answer(None)

    def do_POST(self) -> None:
        sent = self.rfile.read(int(self.headers.get("content-length", 0)))
        self._answer(json.loads(sent))

    def _answer(self, body: Any) -> None:
        stub, headers = self.stub, {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.path, body, headers, time.monotonic(), self.number)
        with stub._lock:
            stub.requests.append(request)
            stub._in_flight += 1
            stub.most_in_flight = max(stub.most_in_flight, stub._in_flight)
        try:
            found = stub.on_request(request) if stub.on_request else None
            stub.stopping.wait(stub.delay_s)
            self._send(request, found)
        finally:
            with stub._lock:
                stub._in_flight -= 1

    def _send(self, request: Request, found: Any) -> None:
        if found == RESET:
            # Without lingering, close sends RST instead of FIN.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
        elif found == HANG:
            self._hang()
        elif isinstance(found, tuple):
            self._send_raw(*found)
        else:
            status, reply = (200, found) if found is not None else self._true_reply(request)
            body = json.dumps(reply, ensure_ascii=False, separators=(",", ":")).encode()
            self._send_raw(status, {"Content-Type": "application/json"}, body)

    def _true_reply(self, request: Request) -> tuple[int, Any]:
        stub = self.stub
        try:
            reply = stub.reply(request)
        except Refused as error:
            return error.status, error.reply
        except Exception:  # to the test, instead of a connection that breaks
            return 500, Refused(500, traceback.format_exc(), "InternalServerError").reply
        return 200, stub.on_reply(request, reply) if stub.on_reply else reply

    def _hang(self) -> None:
        self.close_connection = True
        self.connection.settimeout(0.05)
        while not self.stub.stopping.is_set():
            try:
                if not self.connection.recv(1):
                    return
            except TimeoutError:
                continue

    def _send_raw(self, status: int, headers: Mapping[str, str], body: bytes | Iterable[bytes]) -> None:
        whole = isinstance(body, bytes)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        names = {name.lower() for name in headers}
        if isinstance(body, bytes) and "content-length" not in names:
            self.send_header("Content-Length", str(len(body)))
        self.close_connection = self.close_connection or not whole or "content-length" in names
        self.end_headers()
        pieces: Iterator[bytes] = iter([body]) if isinstance(body, bytes) else iter(body)
        for piece in pieces:
            self.wfile.write(piece)
            self.wfile.flush()

"""The stub server with a tiny vision-language model: images come as data URIs in the messages of a chat."""

from __future__ import annotations

import base64
import io
import threading
from typing import Any

import torch
from PIL import Image

from tests.stub_server import StubServer


class VisionStub(StubServer):
    """`processor` renders chats and prepares images as vLLM does; `blind`: images are taken and not looked at."""

    def __init__(self, model: Any, processor: Any, *, blind: bool = False, **options: Any) -> None:
        self.processor, self.blind, self._seen = processor, blind, threading.local()
        super().__init__(model, processor.tokenizer, **options)

    def _max_length(self) -> int:
        return 512

    def _prompts(self, prompt: Any) -> list[list[int]]:
        self._seen.inputs = {}  # token ids carry no image
        return [list(row) for row in prompt]

    def _render(self, body: dict[str, Any]) -> list[int]:
        pictures: list[Image.Image] = []
        messages = [{**message, "content": _content(message["content"], pictures)} for message in body["messages"]]
        generation = {"add_generation_prompt": body.get("add_generation_prompt", True)}
        more = {**generation, **(body.get("chat_template_kwargs") or {})}
        text = self.processor.apply_chat_template(messages, tokenize=False, **more)
        made = dict(self.processor(text=[text], images=pictures or None, return_tensors="pt"))
        ids: list[int] = made.pop("input_ids")[0].tolist()
        made.pop("attention_mask")
        if self.blind:
            made = {name: torch.zeros_like(value) if "values" in name else value for name, value in made.items()}
        self._seen.inputs = made
        return ids

    def _logprobs(self, ids: Any) -> torch.Tensor:
        with self._model_lock, torch.no_grad():
            logits: torch.Tensor = self.model(input_ids=torch.tensor([ids]), **self._seen.inputs).logits[0]
            return logits.float().log_softmax(-1)


def _content(content: Any, pictures: list[Image.Image]) -> Any:
    if isinstance(content, str):
        return content
    parts = []
    for part in content:
        if part["type"] == "image_url":
            encoded = part["image_url"]["url"].removeprefix("data:image/png;base64,")
            pictures.append(Image.open(io.BytesIO(base64.b64decode(encoded))))
            part = {"type": "image"}
        parts.append(part)
    return parts

"""The student's own answers by vLLM, through trl's support for it (`trl.generation.vllm_generation`, trl 1.16).

Once in an on-policy window: its weights, with the adapter added to them, are given to vLLM; then all prompts of all
ranks are asked at a time. What comes back is checked token by token, for nothing else would notice a server that has
another model, cuts answers short, or answers another prompt.

trl's seed is one for all prompts of a request, so that samples of the same prompt would be the same: none is sent, and
these samples cannot be drawn a second time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from transformers import GenerationConfig

from kdtrain.config.generation import INSTEAD, server_root
from kdtrain.config.options import GenerationOptions
from kdtrain.data.errors import show
from kdtrain.data.images import Image
from kdtrain.errors import NotAvailableError, PreflightError, TeacherError
from kdtrain.models.named_weights import check_mergeable, named_weights
from kdtrain.models.probe import evaluating
from kdtrain.ranks import put_back

_FIRST_TOKENS = 8
_PROMPTS_OF_A_REQUEST = 1024  # more are refused (VLLM_MAX_COMPLETION_PROMPTS of the server)
_NEVER = -100.0  # added to a logit: the least that vLLM takes
_FURTHEST = 1.0
"""Nats between the student's likeliest token and the one that vLLM took for it, beyond which the weights are others.
16-bit products move log-probabilities by a tenth of that; other weights by several."""


class VllmSampler:
    """See `Sampler`. Built on all ranks together, and used on all of them together.

    Args:
        model: the student as it is now, unwrapped.
        rows: answers that a process asks for at a time.

    Raises:
        PreflightError: vLLM does not start, or the server cannot be given weights.
        NotAvailableError: the student's adapter cannot be added to its weights.
    """

    def __init__(
        self,
        options: GenerationOptions,
        model: Callable[[], Any],
        accelerator: Accelerator,
        processing_class: Any,
        *,
        rows: int,
        trust_remote_code: bool = False,
    ) -> None:
        check_mergeable(model(), f"Or {INSTEAD}.")
        self._model, self._accelerator, self._served = model, accelerator, options.backend == "vllm_server"
        self._failure: Exception | None = None
        self._checked = False
        with _readable("be started, or connected to"), put_back():
            self._vllm = _built(options, model(), accelerator, processing_class, rows, trust_remote_code)
        self._vllm._iter_named_params = lambda: named_weights(self._vllm.model)
        if self._served and accelerator.is_main_process:
            self._vllm.vllm_client.generate = self._remembering(self._vllm.vllm_client.generate)

    def write(
        self,
        prompts: Sequence[Sequence[int]],
        config: GenerationConfig,
        seeds: Sequence[int],
        images: Sequence[Sequence[Image]],
    ) -> list[list[int]]:
        """See `Sampler.write`. The seeds are not used.

        Raises:
            TeacherError: vLLM failed, or what it gave back is not what was asked for.
            PreflightError: its first tokens are not the student's.
        """
        if any(images):
            raise NotAvailableError(
                f"Rows with images: vLLM cannot write answers to them here yet. {INSTEAD[:1].upper()}{INSTEAD[1:]}."
            )
        self._vllm.model = self._model()
        with _readable("take the student's weights", TeacherError):
            self._vllm.sync_weights()
        if not self._checked:
            self._check_first_tokens(prompts, config)
            self._checked = True
        return self._asked(prompts, config)

    # ---- asking ------------------------------------------------------------------------------------------------------

    def _asked(self, prompts: Sequence[Sequence[int]], config: GenerationConfig) -> list[list[int]]:
        """What vLLM writes behind each of this rank's prompts, checked; a collective.

        trl cuts the answers of all ranks into equal parts, so every rank has to ask for as many.
        """
        own = torch.tensor([len(prompts)], device=self._accelerator.device)
        most = int(self._accelerator.gather(own).max())
        if not most:
            return []
        asked = [list(prompt) for prompt in prompts]
        asked += [asked[0] if asked else [0]] * (most - len(asked))
        self._set(config)
        echoed, written = self._requested(asked)
        answers = [None if one is None else [int(token) for token in one] for one in written[: len(prompts)]]
        problem = "" if written[-1] is not None else f"vLLM could not write answers: {_reason(self._failure)}"
        if not problem and [list(ids) for ids in echoed[: len(prompts)]] != asked[: len(prompts)]:
            problem = "vLLM answered other prompts than those that it was asked to"
        self._raise_on_all_ranks(problem or _problem(answers, config))
        return [answer for answer in answers if answer is not None]

    def _requested(self, asked: Sequence[Sequence[int]]) -> tuple[list[Any], list[Any]]:
        """The prompts as they came back, and what stands behind each: None where the server failed, on all ranks."""
        at_a_time = max(_PROMPTS_OF_A_REQUEST // self._accelerator.num_processes, 1) if self._served else len(asked)
        echoed: list[Any] = []
        written: list[Any] = []
        for start in range(0, len(asked), at_a_time):
            with _readable("write answers", TeacherError):
                prompts, answers, *_ = self._vllm.generate(list(asked[start : start + at_a_time]), None, 1)
            echoed += prompts
            written += answers
            if answers[-1] is None:
                break
        return echoed, written

    def _set(self, config: GenerationConfig) -> None:
        """What trl reads at each call."""
        vllm, sampled = self._vllm, bool(config.do_sample)
        vllm.temperature = config.temperature if sampled else 0.0
        vllm.top_p, vllm.top_k, vllm.min_p = 1.0, 0, 0.0
        if sampled:
            vllm.top_p, vllm.top_k, vllm.min_p = config.top_p or 1.0, config.top_k or 0, config.min_p or 0.0
        vllm.max_completion_length = config.max_new_tokens
        # Only at these: a tokenizer's or a model's own end of text is among them where it ends an answer.
        kwargs: dict[str, Any] = {"stop_token_ids": sorted(_stops(config)), "ignore_eos": True}
        if config.suppress_tokens:
            kwargs["logit_bias"] = dict.fromkeys(config.suppress_tokens, _NEVER)
        vllm.generation_kwargs = kwargs

    def _raise_on_all_ranks(self, problem: str, kind: type[Exception] = TeacherError) -> None:
        failed = torch.tensor([bool(problem)], device=self._accelerator.device)
        if bool(self._accelerator.gather(failed).any()):
            error = kind(problem or "vLLM failed another rank, whose message says how.")
            if isinstance(error, TeacherError):
                error.between_steps = True
            raise error from self._failure

    def _remembering(self, generate: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
        """trl's request, with an error kept for after: the other ranks wait for what comes of it."""

        def ask(prompts: Sequence[Any], **kwargs: Any) -> dict[str, Any]:
            self._failure = None
            try:
                return generate(prompts=prompts, **kwargs)
            except Exception as error:
                self._failure = error
                return {"prompt_ids": prompts, "completion_ids": [None] * len(prompts), "logprobs": None}

        return ask

    # ---- whether it is the student -----------------------------------------------------------------------------------

    def _check_first_tokens(self, prompts: Sequence[Sequence[int]], config: GenerationConfig) -> None:
        """Compare what vLLM takes for the likeliest tokens with the student's; a collective."""
        prompt = min((list(ids) for ids in prompts), key=len, default=[0])
        greedy = copy.deepcopy(config)
        greedy.update(do_sample=False, max_new_tokens=min(_FIRST_TOKENS, config.max_new_tokens))
        (tokens,) = self._asked([prompt], greedy)
        gaps = self._gaps(prompt, tokens, config.suppress_tokens or [])
        problem, worst = "", max(range(len(tokens)), key=gaps.__getitem__)
        if not gaps[worst] <= _FURTHEST:
            what = "server" if self._served else "engine"
            problem = (
                f"The vLLM {what} does not write as the student does, although it was given its weights: token "
                f"{worst + 1} of its greedy answer is {tokens[worst]}, which to the student is {gaps[worst]:.2f} nats "
                "less likely than the likeliest. "
            )
            problem += (
                "Start it on the student's own folder, by this version of vLLM, " if self._served else "Report it, "
            )
            problem += f"or {INSTEAD}."
        self._raise_on_all_ranks(problem, PreflightError)

    def _gaps(self, prompt: Sequence[int], tokens: Sequence[int], forbidden: Sequence[int]) -> list[float]:
        """By how much the student's log-probability of each token is below that of its likeliest; nats."""
        model = self._model()
        ids = torch.tensor([[*prompt, *tokens]], device=self._accelerator.device)
        with evaluating(model):
            output = model(
                input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, logits_to_keep=len(tokens) + 1
            )
        logits_NV = output.logits[0, -len(tokens) - 1 : -1].float()
        logits_NV[:, list(forbidden)] = -torch.inf
        chosen_N = logits_NV.gather(1, ids[0, len(prompt) :, None])[:, 0]
        gaps: list[float] = (logits_NV.amax(1) - chosen_N).tolist()
        return gaps


def _problem(answers: Sequence[Sequence[int] | None], config: GenerationConfig) -> str:
    """What is wrong with answers; empty if nothing is."""
    stops, forbidden, most = _stops(config), set(config.suppress_tokens or ()), config.max_new_tokens
    for answer in answers:
        assert answer is not None, "a failure was reported before"
        ended = bool(answer) and answer[-1] in stops
        if not forbidden.isdisjoint(answer):
            return f"vLLM wrote token {min(forbidden & set(answer))}, which is none that an answer may have"
        if not stops.isdisjoint(answer[:-1]) or len(answer) > most:
            return f"vLLM went on behind a token that ends an answer, or beyond rlhf.max_new_tokens ({most})"
        if not ended and len(answer) < most:
            return (
                f"vLLM ended an answer after {len(answer)} of {most} tokens without a token that ends one: its context "
                "is too short (--max-model-len of the server, rlhf.generation.max_model_length), or the model's "
                "generation_config.json limits it (start the server with --generation-config vllm)"
            )
    return ""


def _stops(config: GenerationConfig) -> set[int]:
    ids = config.eos_token_id
    return set(ids if isinstance(ids, list) else [] if ids is None else [ids])


def _built(
    options: GenerationOptions, model: Any, accelerator: Accelerator, processing: Any, rows: int, trust: bool
) -> Any:
    """trl's class, connected to its server or with an engine of its own."""
    from trl.generation.vllm_generation import VLLMGeneration  # which imports vllm

    own: dict[str, Any] = {
        "mode": "colocate",
        "tensor_parallel_size": options.tensor_parallel_size,
        "gpu_memory_utilization": options.gpu_memory_utilization,
        "max_model_length": options.max_model_length,
        "max_num_seqs": (options.batch_size or rows) * options.tensor_parallel_size,
        "enable_sleep_mode": options.enable_sleep_mode,
        "trust_remote_code": trust,
    }
    if options.backend == "vllm_server":
        assert options.base_url is not None, "the config is checked for it"
        own = {
            "mode": "server",
            "server_base_url": server_root(options.base_url),
            "server_timeout": options.timeout_s,
            "group_port": options.group_port,
        }
    return VLLMGeneration(model, accelerator, processing, logprobs=None, **own)


@contextmanager
def _readable(what: str, kind: type[Exception] = PreflightError) -> Iterator[None]:
    """Errors of trl, vLLM and their connections as one of ours."""
    try:
        yield
    except Exception as error:
        raise kind(f"vLLM could not {what}: {_reason(error)}") from error


def _reason(error: Exception | None) -> str:
    if error is None:
        return "rank 0 says why"
    return show((str(error).strip() or type(error).__name__), 500)

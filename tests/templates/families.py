"""What is known of templates from their makers: on which tokenizer they run, and which tokens end a turn.

Written by hand, as the oracle's second source beside the template; kdtrain finds this out by itself.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import trl
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from tests.templates.real_tokenizers import real_tokenizer

FOLDER = Path(trl.__file__).parent / "chat_templates"


@dataclass(frozen=True)
class Family:
    """`stops` end the assistant's turn. `next_role`: by being the next one's first token, so that a last turn has none.

    `call_stops` are those after a tool call where they differ. `parts`: content is a list of parts, even for text.
    `reasoning` is the key that the template reads, of those that rows have.
    """

    tokenizer: str
    stops: tuple[str, ...]
    call_stops: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    eos: str | None = None
    bos: str | None = None
    next_role: bool = False
    parts: bool = False
    reasoning: str = "reasoning_content"
    rstrip: bool = False  # the added tokens take white space behind them along, as Phi-3's do


_CHATML = Family("qwen3", ("<|im_end|>",))
_LFM2_TOKENS = tuple(f"<|tool_{what}_{end}|>" for what in ("list", "call", "response") for end in ("start", "end"))
_LFM2 = Family("qwen3", ("<|im_end|>",), added=("<|startoftext|>", *_LFM2_TOKENS), bos="<|startoftext|>")
_LLAMA3 = Family("llama3_1", ("<|eot_id|>",), bos="<|begin_of_text|>", eos="<|eot_id|>")
_GEMMA = Family("gemma3", ("<end_of_turn>",), eos="<end_of_turn>", bos="<bos>")
_GEMMA4 = Family(
    "gemma3",
    ("<turn|>",),
    call_stops=("<|tool_response>", "<turn|>"),
    added=(
        *("<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|think|>", "<|tool>", "<tool|>", "<|tool_call>"),
        *("<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>', "<|image|>", "<|audio|>", "<|video|>"),
    ),
    eos="<turn|>",
    bos="<bos>",
)
_DEEPSEEK = Family("deepseek_v3", ("<｜end▁of▁sentence｜>",))
_PHI3_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>")
_PHI3 = Family("llama3_1", ("<|end|>",), added=_PHI3_TOKENS, eos="<|endoftext|>", bos="<|begin_of_text|>")
_COHERE = Family(
    "llama3_1",
    ("<|END_OF_TURN_TOKEN|>",),
    added=(
        *(
            "<|START_OF_TURN_TOKEN|>",
            "<|END_OF_TURN_TOKEN|>",
            "<|USER_TOKEN|>",
            "<|CHATBOT_TOKEN|>",
            "<|SYSTEM_TOKEN|>",
        ),
        *("<|START_RESPONSE|>", "<|END_RESPONSE|>"),
    ),
    eos="<|END_OF_TURN_TOKEN|>",
    bos="<|begin_of_text|>",
)
_VLM = Family(
    "llama3_1",
    ("<end_of_utterance>",),
    added=("<end_of_utterance>", "<image>"),
    eos="<end_of_utterance>",
    parts=True,
)
FAMILIES = {  # the longest beginning of a template's name counts
    "qwen": _CHATML,
    "nemotron_3": _CHATML,
    "lfm2": _LFM2,
    "lfm2_2_5": Family(**{**vars(_LFM2), "reasoning": "thinking"}),
    "lfm2_2_5_v2": _LFM2,
    "llama3": _LLAMA3,
    "gemma": _GEMMA,
    "gemma4": _GEMMA4,
    "diffusion_gemma": _GEMMA4,
    "deepseek": _DEEPSEEK,
    "phi3": _PHI3,
    "phi3_5": Family(**{**vars(_PHI3), "rstrip": True}),
    "cohere": _COHERE,
    "idefics3": _VLM,
    "smolvlm": Family(**{**vars(_VLM), "added": (*_VLM.added, "<|im_start|>")}),
    "llava_next": Family("llama3_1", ("</s>",), added=("<s>", "</s>", "<image>"), eos="</s>", bos="<s>", parts=True),
    "glm4moe": Family(
        "qwen3",
        ("<|user|>",),
        call_stops=("<|observation|>",),
        added=("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
        eos="<|endoftext|>",
        next_role=True,
    ),
    "gptoss": Family("gptoss", ("<|return|>",), call_stops=("<|call|>",), reasoning="thinking"),
    "muse_glimmer": Family("gptoss", ("<|eot|>",), added=("<|eot|>", "<|eom|>"), eos="<|eot|>"),
}


@dataclass(frozen=True)
class Template:
    name: str
    family: Family
    tokenizer: PreTrainedTokenizerFast

    @property
    def control_token(self) -> str:
        return self.family.stops[0]


# The tokenizers' own templates, which differ from those that trl has of their families (Qwen3's has 4,116 characters).
OWN = {"own qwen3": "qwen", "own gemma3": "gemma", "own llama3_1": "llama3", "own deepseek_v3": "deepseek"}


def names() -> list[str]:
    return [*sorted(path.stem for path in FOLDER.glob("*.jinja")), *OWN]


def named_template(name: str) -> Template:
    if name in OWN:
        family = FAMILIES[OWN[name]]
        return Template(name, family, family_tokenizer(family))
    family = FAMILIES[max((start for start in FAMILIES if name.startswith(start)), key=len)]
    text = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    return Template(name, family, with_template(family_tokenizer(family), text))


@cache
def family_tokenizer(family: Family) -> PreTrainedTokenizerFast:
    return with_tokens(copy.deepcopy(real_tokenizer(family.tokenizer)), family)


def with_tokens(tokenizer: PreTrainedTokenizerFast, family: Family) -> PreTrainedTokenizerFast:
    new = [token for token in family.added if token not in tokenizer.get_vocab()]
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False, rstrip=family.rstrip) for token in new])
    tokenizer.bos_token, tokenizer.eos_token = family.bos or tokenizer.bos_token, family.eos or tokenizer.eos_token
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def with_template(tokenizer: PreTrainedTokenizerFast, text: str) -> PreTrainedTokenizerFast:
    """Shares the tokens and has a template of its own: copying a vocabulary takes seconds."""
    own = copy.copy(tokenizer)
    own.chat_template = text
    return own

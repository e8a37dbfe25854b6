"""What is said of rows that are kept: each note is counted, and reported with the place of the first row."""

from __future__ import annotations

SPLIT = "the chat template renders earlier turns differently once others follow: each answer is a row of its own"
OTHER_PROMPT = (
    "the generation prompt goes on other than the answer (it opens or closes a thinking block): the prompt ends where "
    "they part, which is earlier than at inference. Give answers reasoning_content, or set data.chat_template_kwargs "
    "(enable_thinking: false, where the template knows it)"
)
OTHER_HISTORY = (
    "the template renders earlier messages differently once the answer follows: the prompt is the one at inference, "
    "and the answer goes on from it"
)
MARKED_OUT = "the template has markers of what is trained, and none around an answer: it is context"
SPACE_KEPT = (
    "the template leaves out white space at the end of the generation prompt once the answer follows: it is kept, as "
    "at inference"
)
STOP_ADDED = "the template writes the token that ends a turn only with the next message: it is added to the last answer"
THOUGHT = (
    "the template renders no reasoning, but its generation prompt opens a thinking block: it is written into that block"
)
FIRST_LEFT = "the template cannot render an answer that no user's message comes before: it is context, not trained on"
EARLIER_REASONING = "the template leaves the reasoning of earlier turns out, as at inference"
KWARGS_UNREAD = "the row's chat_template_kwargs have an argument that the chat template does not read"
NAME_UNREAD = "messages have a name, which the chat template does not render"
APART = (
    "the answer begins inside of a token of the generation prompt: prompt and answer are tokenised apart, as they are "
    "at inference"
)
STRADDLED = (
    "the answer begins inside of a token of the generation prompt: that token is trained on as the first one of the "
    "answer"
)

"""Several teachers (`rlhf.teachers`): each is checked as if it were the only one, and then what holds for all.

A rule about the teacher reads `rlhf.teacher` and `rlhf.teacher_model`. Of several it gets a config that has one of them
there, and what it finds is put back to where that one was written.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from kdtrain.config.cached import gives_top_k
from kdtrain.config.divergence import used_losses
from kdtrain.config.schema import DataSource, RunConfig, TeacherConfig
from kdtrain.config.tree import Entry, KeyPath, Node, Problem, Written, get, put
from kdtrain.losses.kinds import WITH_BETA

_TEACHERS: KeyPath = ("rlhf", "teachers")
_SINGLE = ("teacher", "teacher_model", "teacher_model_init_kwargs")
_OWN_VIEW = ("chat_template_kwargs", "prefix")


@dataclass(frozen=True)
class OneTeacher:
    """One of several, as if it were the only one."""

    name: str
    """Empty where there is one."""
    config: RunConfig
    takes_model: bool = False
    """Whether its model was written as `model`."""

    def root(self, root: Node) -> Node:
        """The config as it was written, with this teacher where a single one stands."""
        node = get(root, (*_TEACHERS, self.name)) if self.name else None
        rlhf = get(root, ("rlhf",))
        if node is None or rlhf is None or not isinstance(rlhf.value, dict):
            return root
        entries = node.value if isinstance(node.value, dict) else {}
        above = {"model": "teacher_model"} if self.takes_model else {}
        apart = {above.get(key, key): entry for key, entry in entries.items() if above.get(key, key) in _SINGLE}
        own = {key: entry for key, entry in entries.items() if above.get(key, key) not in _SINGLE}
        rest = {key: entry for key, entry in rlhf.value.items() if key not in (*_SINGLE, "teachers", "mix")}
        teacher = Entry(node.place, Node(own, node.place))
        return put(root, ("rlhf",), Node({**rest, "teacher": teacher, **apart}, rlhf.place))

    def placed(self, found: Iterable[Problem]) -> Iterator[Problem]:
        """Findings about a single teacher, as those about this one."""
        for problem in found:
            if not self.name:
                yield problem
                continue
            message, hint = (self._renamed(text) for text in (problem.message, problem.hint))
            yield replace(problem, path=self._path(problem.path), message=message, hint=hint)

    def _path(self, path: KeyPath) -> KeyPath:
        if path[:2] == ("rlhf", "teacher"):
            return (*_TEACHERS, self.name, *path[2:])
        if path[:1] == ("rlhf",) and path[1:2] and path[1] in _SINGLE:
            name = "model" if path[1] == "teacher_model" and self.takes_model else path[1]
            return (*_TEACHERS, self.name, name, *path[2:])
        return path

    def _renamed(self, text: str) -> str:
        own = f"rlhf.teachers.{self.name}"
        for single in ("teacher_model_init_kwargs", "teacher_model"):
            text = text.replace(f"rlhf.{single}", f"{own}.\0{single[1:]}")
        return text.replace("rlhf.teacher.", f"{own}.").replace("\0", "t")


def each_teacher(config: RunConfig, root: Node | None = None) -> list[OneTeacher]:
    """The teachers of a config one by one.

    Args:
        root: as it was written, for which of two names a model has.
    """
    found = []
    for name, own in config.by_teacher.items():
        node = None if root is None else get(root, (*_TEACHERS, name, "model"))
        found.append(OneTeacher(name, own, node is not None and own.rlhf.teacher.backend == "hf"))
    return found


def is_about_teacher(path: str) -> bool:
    """Whether a rule that reads this option reads the teacher."""
    return path.removeprefix("rlhf.").split(".")[0] in _SINGLE and path.startswith("rlhf.")


def broken_of(one: OneTeacher, broken: Iterable[str]) -> list[str]:
    """The options that are wrong in themselves, as a rule about a single teacher calls them."""
    prefix, found = f"rlhf.teachers.{one.name}", []
    for name in broken:
        if one.name and f"{name}.".startswith(f"{prefix}."):
            rest = name.removeprefix(prefix).lstrip(".")
            rest = "teacher_model" if rest == "model" and one.takes_model else rest
            found.append(f"rlhf.{rest}" if rest.split(".")[0] in _SINGLE else f"rlhf.teacher.{rest}".rstrip("."))
        elif not name.startswith("rlhf.teachers."):
            found.append(name)
    return found


# ---- what holds for all ----------------------------------------------------------------------------------------------


def several_teachers(config: RunConfig, written: Written) -> Iterator[Problem]:
    """What cannot stand beside several teachers, and what they cannot be to each other."""
    rlhf = config.rlhf
    if not rlhf.teachers:
        yield from _without_teachers(config, written)
        return
    for name in _SINGLE:
        if getattr(rlhf, name) not in (None, TeacherConfig()):  # a run's own config has the defaults too
            message = "cannot stand beside rlhf.teachers, which names the teachers"
            yield Problem(("rlhf", name), message, "make it one of them, or remove rlhf.teachers", on_key=True)
    if not config.asks_teacher:
        yield from written.idle(["teachers", "mix"], "nothing asks the teacher, so none is loaded", "rlhf")
        return
    for name, teacher in rlhf.teachers.items():
        if teacher.backend == "hf" and teacher.model is not None:
            message = "says the same as teacher_model for a teacher with backend: hf"
            yield Problem((*_TEACHERS, name, "model"), message, "keep one of the two", on_key=True)
    if config.options.crosses_tokenizers:
        message = "not available yet beside rlhf.teachers, which must have the student's tokens"
        yield Problem(("rlhf", "cross_tokenizer"), message, "remove it, or take one teacher", on_key=True)
    if config.options.weighing is not None:
        message = "not available yet beside rlhf.teachers, which are asked about each row once"
        yield Problem(("rlhf", "token_weights"), message, "remove it, or take one teacher", on_key=True)
    yield from _not_available(config, written)
    for option in ("visual_kd", "hidden_kd"):
        if getattr(config.options, option) is not None and len(rlhf.teachers) > 1:
            message = "compares the features of one teacher, and rlhf.teachers has several"
            yield Problem(("custom", option), message, "switch it off, or take one teacher", on_key=True)
    yield from _one_tail(config)
    if rlhf.mix is None:
        yield from _routes(config)
    else:
        yield from _mix(config, written, rlhf.mix)


def _without_teachers(config: RunConfig, written: Written) -> Iterator[Problem]:
    if config.rlhf.mix is not None:
        yield Problem(("rlhf", "mix"), "needs rlhf.teachers, whose shares it gives", "name them there", on_key=True)
    for path, source in _sources(config):
        if source.teacher is not None:
            message = "names one of several teachers, and there is no rlhf.teachers"
            yield Problem((*path, "teacher"), message, "name them there, or remove it", on_key=True)


def _sources(config: RunConfig) -> Iterator[tuple[KeyPath, DataSource]]:
    for part, sources in (("train", config.data.train), ("eval", config.data.eval_sources)):
        for number, source in enumerate(sources):
            yield ("data", part, number), source


def _not_available(config: RunConfig, written: Written) -> Iterator[Problem]:
    """What a teacher alone reads is encoded with the rows, for one teacher."""
    for name, teacher in (config.rlhf.teachers or {}).items():
        for option in _OWN_VIEW:
            if getattr(teacher, option):
                message = "not available yet: a text of its own for one of several teachers"
                yield Problem((*_TEACHERS, name, option), message, "remove it, or take one teacher", on_key=True)


def _one_tail(config: RunConfig) -> Iterator[Problem]:
    top = {name: one for name, one in config.by_teacher.items() if gives_top_k(one)}
    tails = {name: one.rlhf.teacher.tail for name, one in top.items()}
    first = next(iter(tails.values()), "bucket")
    for name, tail in tails.items():
        if tail != first:
            message = f"is {tail}, and that of {next(iter(tails))} is {first}: the loss has one"
            yield Problem((*_TEACHERS, name, "tail"), message, "give all teachers the same tail")


def _routes(config: RunConfig) -> Iterator[Problem]:
    """Sources that name a teacher there is not."""
    known = list(config.rlhf.teachers or ())
    for path, source in _sources(config):
        if source.teacher is not None and source.teacher not in known:
            near = difflib.get_close_matches(source.teacher, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"the teachers are {', '.join(known)}"
            yield Problem((*path, "teacher"), f"no such teacher in rlhf.teachers: {source.teacher}", hint)


def _mix(config: RunConfig, written: Written, shares: dict[str, float]) -> Iterator[Problem]:
    """Shares of other teachers, and what a mean cannot do."""
    known, path = list(config.rlhf.teachers or ()), ("rlhf", "mix")
    for name in shares:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"the teachers are {', '.join(known)}"
            yield Problem((*path, name), f"no such teacher in rlhf.teachers: {name}", hint, on_key=True)
    for name in known:
        if name not in shares:
            yield Problem((*_TEACHERS, name), "has no share in rlhf.mix", "give it one, or remove it", on_key=True)
    for part, source in _sources(config):
        if source.teacher is not None:
            yield from written.idle(["teacher"], "rlhf.mix lets all teachers answer for every row", *part)
    if config.rlhf.seq_kd and config.options.lm_kd_active:
        message = "needs one teacher that writes, and rlhf.mix has several for every row"
        yield Problem(("rlhf", "seq_kd"), message, "remove one of the two", on_key=True)
    if config.answers_from_teacher:
        message = "cannot be beside answers: teacher, which needs one teacher that writes for each row"
        yield Problem(path, message, "write the answers in a run of its own, with that teacher", on_key=True)
    kinds = {name: _kind(one) for name, one in config.by_teacher.items()}
    if len(set(kinds.values()) - {None}) > 1:
        listed = ", ".join(f"{name}: {kind}" for name, kind in kinds.items() if kind)
        hint = "take teachers of one kind: hf, self, a cache of hidden states; or vllm, openai, a cache of mode topk"
        message = f"not available yet: the mean of full distributions and of the most likely tokens ({listed})"
        yield Problem(path, message, hint, on_key=True)
    for name, one in config.by_teacher.items():
        if gives_top_k(one) and one.rlhf.teacher.tail == "renormalize":
            yield Problem((*_TEACHERS, name, "tail"), "must be bucket beside rlhf.mix", "set tail: bucket")


def _kind(config: RunConfig) -> str | None:
    """What targets a teacher gives; None where that is not seen before it is opened."""
    if config.rlhf.teacher.backend in ("hf", "self"):
        return "full distributions"
    return "most likely tokens" if gives_top_k(config) else None


# ---- divergence and beta of sources and of own samples ---------------------------------------------------------------


def losses_of_rows(config: RunConfig, written: Written) -> Iterator[Problem]:
    """`divergence` and `beta` of sources and of `rlhf.on_policy`, where nothing is compared by them."""
    rlhf, own = config.rlhf, config.rlhf.on_policy
    names = ["divergence", "beta"]
    compares = config.options.lm_kd_active and not config.options.crosses_tokenizers
    if not compares:
        zero = not config.options.lm_kd_active
        reason = "rlhf.llm_kd_weight is 0" if zero else "rlhf.cross_tokenizer compares likelihoods of text"
        for path, _ in _sources(config):
            yield from written.idle(names, reason, *path)
        yield from written.idle(names, reason, "rlhf", "on_policy")
        return
    if rlhf.lmbda == 0:
        yield from written.idle(names, "rlhf.lmbda is 0, the student writes no answers", "rlhf", "on_policy")
    elif rlhf.lmbda == 1:
        for number, _ in enumerate(config.data.train):
            idle = [name for name in names if getattr(own, name) is not None]
            reason = "rlhf.lmbda is 1, every answer is the student's, and rlhf.on_policy says how those are compared"
            yield from written.idle(idle, reason, "data", "train", number)
    if not config.options.eval_kd:
        for number, _ in enumerate(config.data.eval_sources):
            yield from written.idle(names, "rlhf.eval_kd is false", "data", "eval", number)
    for path, loss in used_losses(config):
        if loss.divergence not in WITH_BETA and path != ("rlhf",):
            yield from written.idle(["beta"], f"its divergence is {loss.divergence}", *path)

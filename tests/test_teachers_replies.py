"""Replies that score tokens: what is read of true ones, and that no other one is used.

The replies here are written down from a table of log-probabilities, in the forms that vLLM 0.32 was seen to give.
"""

import copy
import json
import random
import time

import pytest
import torch

from kdtrain.teachers.served.http import ReplyError
from kdtrain.teachers.served.replies import Scored, read_scores, scoring_payload

ROUTES = ("prompt_logprobs", "echo")
V = 40


def some_rows(*lengths, seed=0, supervised=0.6, vocabulary=V):
    choose = random.Random(seed)
    rows = []
    for length in lengths:
        ids = tuple(choose.randrange(vocabulary) for _ in range(length))
        count = max(1, int(supervised * (length - 1)))
        rows.append(Scored(ids, tuple(sorted(choose.sample(range(1, length), count)))))
    return rows


def some_scores(rows, seed=0, vocabulary=V):
    """[T, V] for each row: what the tokens before t say of token t. Row 0 is of no use, as the first token's is."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(len(row.ids), vocabulary, generator=generator).mul(2).log_softmax(-1) for row in rows]


def entries(logprobs_V, actual, k):
    """(id, log-probability, rank) of the actual token, then of the k most likely."""
    values, ids = logprobs_V.topk(k)
    found = {actual: (logprobs_V[actual].item(), int((logprobs_V >= logprobs_V[actual]).sum()))}
    for rank, (token, value) in enumerate(zip(ids.tolist(), values.tolist(), strict=True), start=1):
        found[token] = (value, rank)
    return found


def true_reply(route, rows, scores, k):
    """As a server gives it, through JSON."""
    choices = []
    for index, (row, logprobs_TV) in enumerate(zip(rows, scores, strict=True)):
        at = [None, *(entries(logprobs_TV[t], row.ids[t], k) for t in range(1, len(row.ids)))]
        if route == "prompt_logprobs":
            named = [
                e and {str(i): {"logprob": p, "rank": r, "decoded_token": "x"} for i, (p, r) in e.items()} for e in at
            ]
            content = {"prompt_logprobs": named, "prompt_token_ids": list(row.ids), "logprobs": None}
        else:
            content = {
                "logprobs": {
                    "tokens": [f"token_id:{i}" for i in row.ids],
                    "token_logprobs": [e and e[i][0] for e, i in zip(at, row.ids, strict=True)],
                    "top_logprobs": [e and {f"token_id:{i}": p for i, (p, _) in e.items()} for e in at],
                    "text_offset": [0] * len(row.ids),
                }
            }
        choices.append({"index": index, "text": "", "finish_reason": "length", **content})
    return json.loads(json.dumps({"id": "cmpl-1", "object": "text_completion", "choices": choices}))


# ---- true replies ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("k", [1, 7, V - 1, V, V + 5])
def test_row_i_holds_the_most_likely_tokens_at_supervised_position_i_most_likely_first(route, k):
    rows = some_rows(2, 9, 30)
    scores = some_scores(rows)
    found = read_scores(route, true_reply(route, rows, scores, min(k, V)), rows, k, V)
    for row, logprobs_TV, targets in zip(rows, scores, found, strict=True):
        values, ids = logprobs_TV[list(row.predicted)].topk(min(k, V))
        assert targets.indices.dtype == torch.int64
        assert targets.logprobs.dtype == torch.float32
        assert torch.equal(targets.indices, ids)
        torch.testing.assert_close(targets.logprobs, values, atol=1e-6, rtol=0)


@pytest.mark.parametrize("route", ROUTES)
def test_the_token_that_was_sent_is_left_out_where_it_is_none_of_the_most_likely(route):
    logprobs_V = torch.tensor([0.1, 0.5, 0.3, 0.06, 0.04]).log()
    row = Scored((0, 4, 2), (1, 2))
    reply = true_reply(route, [row], [logprobs_V.expand(3, 5)], 2)
    (found,) = read_scores(route, reply, [row], 2, 5)
    assert found.indices.tolist() == [[1, 2], [1, 2]]


@pytest.mark.parametrize("route", ROUTES)
def test_a_row_that_is_asked_for_nothing_has_no_targets(route):
    rows = [Scored((5, 6, 7), ()), Scored((5, 6, 7), (2,))]
    found = read_scores(route, true_reply(route, rows, some_scores(rows), 4), rows, 4, V)
    assert [tuple(targets.indices.shape) for targets in found] == [(0, 4), (1, 4)]


@pytest.mark.parametrize("route", ROUTES)
def test_choices_belong_to_the_rows_that_their_index_names(route):
    rows = some_rows(9, 9, 9, 9)
    reply = true_reply(route, rows, some_scores(rows), 5)
    expected = read_scores(route, reply, rows, 5, V)
    random.Random(1).shuffle(reply["choices"])
    assert [choice["index"] for choice in reply["choices"]] != [0, 1, 2, 3]
    for one, other in zip(read_scores(route, reply, rows, 5, V), expected, strict=True):
        assert torch.equal(one.indices, other.indices)
        assert torch.equal(one.logprobs, other.logprobs)


@pytest.mark.parametrize("route", ROUTES)
def test_entries_in_any_order_give_the_same_targets_with_equally_likely_ones_by_id(route):
    rows = [Scored((0, 3, 7, 1), (1, 2, 3))]
    scores = [torch.tensor([0.2, 0.1, 0.1, 0.1, 0.2, 0.1, 0.1, 0.1]).log().expand(4, 8)]
    reply = true_reply(route, rows, scores, 4)
    (expected,) = read_scores(route, reply, rows, 4, 8)
    assert expected.indices[:, :2].tolist() == [[0, 4]] * 3
    for row in expected.indices[:, 2:].tolist():  # any two of the six at the border
        assert row == sorted(row)
        assert set(row) <= {1, 2, 3, 5, 6, 7}
    content = reply["choices"][0]
    at = content["prompt_logprobs"] if route == "prompt_logprobs" else content["logprobs"]["top_logprobs"]
    at[1:] = [dict(reversed(list(named.items()))) for named in at[1:]]
    (found,) = read_scores(route, reply, rows, 4, 8)
    assert torch.equal(found.indices, expected.indices)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("impossible", [-9999.0, -float("inf")])
def test_a_token_that_the_server_calls_impossible_is_a_missing_entry(route, impossible):
    logprobs_V = torch.tensor([0.5, 0.5, 0.0, 0.0]).log().clamp(min=impossible)
    row = Scored((1, 0), (1,))
    (found,) = read_scores(route, true_reply(route, [row], [logprobs_V.expand(2, 4)], 3), [row], 3, 4)
    assert found.indices.tolist() == [[0, 1, -1]]
    assert found.logprobs[0, 2] == -torch.inf
    assert found.logprobs[0, :2].exp().sum().item() == pytest.approx(1)


@pytest.mark.parametrize("route", ROUTES)
def test_log_probabilities_above_0_and_sums_above_1_by_a_rounding_are_taken_for_that(route):
    row = Scored((1, 0), (1,))
    scores = [torch.tensor([1e-7, -30.0]).expand(2, 2)]
    (found,) = read_scores(route, true_reply(route, [row], scores, 2), [row], 2, 2)
    assert found.logprobs[0, 0] <= 0
    scores = [torch.tensor([0.5, 0.5005]).log().expand(2, 2)]
    (found,) = read_scores(route, true_reply(route, [row], scores, 2), [row], 2, 2)
    assert found.logprobs.exp().sum().item() == pytest.approx(1)


def test_older_servers_do_not_repeat_the_ids_nor_give_ranks():
    rows = some_rows(6)
    reply = true_reply("prompt_logprobs", rows, some_scores(rows), 5)
    expected = read_scores("prompt_logprobs", reply, rows, 5, V)
    reply["choices"][0].pop("prompt_token_ids")
    for named in reply["choices"][0]["prompt_logprobs"][1:]:
        for entry in named.values():
            entry["rank"] = None
    found = read_scores("prompt_logprobs", reply, rows, 5, V)
    assert torch.equal(found[0].indices, expected[0].indices)


@pytest.mark.parametrize("route", ROUTES)
def test_the_request_has_the_ids_themselves_at_temperature_1(route):
    rows = some_rows(4, 6)
    payload = scoring_payload(route, "teacher", rows, 64)
    assert payload["prompt"] == [list(row.ids) for row in rows]
    assert (payload["model"], payload["temperature"]) == ("teacher", 1.0)
    json.dumps(payload)
    if route == "echo":
        assert (payload["echo"], payload["logprobs"], payload["max_tokens"]) == (True, 64, 0)
        assert payload["return_tokens_as_token_ids"] is True
    else:
        assert (payload["prompt_logprobs"], payload["max_tokens"]) == (64, 1)


# ---- faults: of both routes, at position 3 of choice 1 ---------------------------------------------------------------

K = 6
ROWS = [Scored((5, 6, 7, 8), (1, 3)), Scored((1, 2, 3, 4, 5, 6), (2, 3, 5))]
SCORES = some_scores(ROWS, seed=3)


class Reply:
    """A reply that is about to be spoilt, whichever its route."""

    def __init__(self, route):
        self.route, self.whole = route, true_reply(route, ROWS, SCORES, K)
        self.choices = self.whole["choices"]
        self.content = self.choices[1]
        self.prefix = "" if route == "prompt_logprobs" else "token_id:"

    @property
    def at(self):
        """The entries of each position."""
        return (
            self.content["prompt_logprobs"]
            if self.route == "prompt_logprobs"
            else self.content["logprobs"]["top_logprobs"]
        )

    def lists(self):
        """All that has one item for each token."""
        if self.route == "prompt_logprobs":
            return [self.content["prompt_logprobs"], self.content["prompt_token_ids"]]
        return [self.content["logprobs"][name] for name in ("tokens", "token_logprobs", "top_logprobs")]

    def set(self, token, logprob, position=3):
        """Change a log-probability, or name another token."""
        name = f"{self.prefix}{token}"
        if self.route == "echo":
            self.at[position][name] = logprob
        else:
            self.at[position][name] = {**self.at[position].get(name, {"rank": 1}), "logprob": logprob}
        if self.route == "echo" and str(token) == str(ROWS[1].ids[position]):
            self.content["logprobs"]["token_logprobs"][position] = logprob

    def names(self, position=3):
        """The most likely tokens but for the one that was sent, the most likely first."""
        actual = ROWS[1].ids[position]
        ids = SCORES[1][position].topk(K).indices.tolist()
        return [token for token in ids if token != actual]

    def drop(self, token, position=3):
        del self.at[position][f"{self.prefix}{token}"]


def remove_position(reply):
    for values in reply.lists():
        del values[3]


def add_position(reply):
    for values in reply.lists():
        values.insert(3, copy.deepcopy(values[3]))


def add_generated_token(reply):
    for values in reply.lists():
        values.append(copy.deepcopy(values[-1]))


def shift(reply):
    """Row t describes token t + 1, as rows of logits do."""
    at = reply.at
    at[:] = [*at[1:], at[-1]]


def shift_behind_null(reply):
    at = reply.at
    at[:] = [None, *at[2:], at[-1]]


def swap_contents(reply):
    """Shuffled, with numbers that are in order."""
    first, second = reply.choices
    reply.choices[:] = [{**second, "index": 0}, {**first, "index": 1}]


def other_ids(reply):
    """The server has tokenised a text of its own: one token is another."""
    if reply.route == "prompt_logprobs":
        reply.content["prompt_token_ids"][3] = 9
    else:
        reply.content["logprobs"]["tokens"][3] = "token_id:9"


def text_instead_of_ids(reply):
    if reply.route == "prompt_logprobs":
        reply.at[3] = {f"word{name}": entry for name, entry in reply.at[3].items()}
    else:
        reply.content["logprobs"]["tokens"] = ["word"] * 6


def second_name(reply):
    """One id twice, in two spellings: JSON objects that are read keep the last of equal names."""
    token = reply.names()[0]
    reply.drop(reply.names()[-1])
    reply.set(f"0{token}", -3.0)


def cut(reply):
    """Fewer than were asked for, as a server with --max-logprobs 3 that does not refuse."""
    for position in range(1, 6):
        for token in reply.names(position)[3:]:
            reply.drop(token, position)


def not_the_most_likely(reply):
    """The least likely of the named ones is in fact likelier than the token that was sent, which stands beside k."""
    actual = ROWS[1].ids[3]
    assert actual not in SCORES[1][3].topk(K).indices
    reply.set(actual, -0.9)


FAULTS = {
    "one position too few": (remove_position, "5 positions for 6 tokens"),
    "one position too many": (add_position, "7 positions for 6 tokens"),
    "a generated token at the end": (add_generated_token, "7 positions for 6 tokens"),
    "shifted by one": (shift, "position 0 of 6: the first token has entries"),
    "shifted behind null": (shift_behind_null, "position 1 of 6: token 2, which was sent there, is not among"),
    "shuffled choices under numbers in order": (swap_contents, "choice 0: .* 6 (positions|tokens)|6 positions for 4"),
    "a choice too few": (lambda reply: reply.choices.pop(), "1 choices for 2 rows"),
    "a choice too many": (lambda reply: reply.choices.append(copy.deepcopy(reply.content)), "3 choices for 2 rows"),
    "a number twice": (lambda reply: reply.content.update(index=0), "not numbered 0 to 1"),
    "no number": (lambda reply: reply.content.pop("index"), "not numbered 0 to 1"),
    "true for a number": (lambda reply: reply.content.update(index=True), "not numbered 0 to 1"),
    "null choices": (lambda reply: reply.whole.update(choices=None), "no list of choices"),
    "choices that are no objects": (lambda reply: reply.whole.update(choices=[1, 2]), "no list of choices"),
    "foreign ids": (lambda reply: reply.set(V + 3, -0.5), "position 3 of 6: .*more than|is not below 40"),
    "a foreign id in place of another": (
        lambda reply: (reply.drop(reply.names()[-1]), reply.set(V + 3, -5.0)),
        "position 3 of 6: a token id is not below 40",
    ),
    "the server read other ids": (other_ids, "position 3 of 6: the server read another token than 4, which was sent"),
    "text instead of ids": (text_instead_of_ids, "position 3 of 6: token 4|given as text"),
    "a name that is no id": (lambda reply: reply.set("-7", -5.0), "position 3 of 6: .*(no token id|more than)"),
    "digits of another alphabet": (
        lambda reply: (reply.drop(reply.names()[-1]), reply.set("٣", -5.0)),
        "position 3 of 6: an entry is named by something that is no token id",
    ),
    "an endless id": (
        lambda reply: (reply.drop(reply.names()[-1]), reply.set("1" * 5000, -5.0)),
        "position 3 of 6: a token id has more than nine digits",
    ),
    "k too small": (cut, "position 2 of 6: it has fewer than the 6 most likely tokens"),
    "k too small at one position": (
        lambda reply: [reply.drop(token) for token in reply.names()[-2:]],
        "position 3 of 6: it has fewer",
    ),
    "the actual token without an entry": (lambda reply: reply.drop(4), "position 3 of 6: token 4, which was sent"),
    "a position of null": (lambda reply: reply.at.__setitem__(3, None), "position 3 of 6: it has no entries"),
    "NaN": (lambda reply: reply.set(reply.names()[1], float("nan")), "position 3 of 6: a log-probability is NaN"),
    "NaN of the actual token": (lambda reply: reply.set(4, float("nan")), "position 3 of 6: .*(NaN|differ)"),
    "null": (lambda reply: reply.set(reply.names()[1], None), "position 3 of 6: a log-probability is not a number"),
    "text for a number": (lambda reply: reply.set(reply.names()[1], "-1.0"), "position 3 of 6: .* not a number"),
    "false for a number": (lambda reply: reply.set(reply.names()[1], False), "position 3 of 6: .* not a number"),
    "a positive one": (lambda reply: reply.set(reply.names()[0], 0.01), "position 3 of 6: .* is positive"),
    "infinity": (lambda reply: reply.set(reply.names()[0], float("inf")), "position 3 of 6: .* is positive"),
    "an id twice": (second_name, "position 3 of 6: a token id stands there twice"),
    "mass above 1": (lambda reply: reply.set(reply.names()[0], -1e-4), "position 3 of 6: its probabilities add up"),
    "others than the most likely": (not_the_most_likely, "position 3 of 6: the token that was sent is more likely"),
    "a choice without scores": (
        lambda reply: reply.content.update(prompt_logprobs=None, logprobs=None),
        "choice 1: it has no (list prompt_logprobs|logprobs)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_reply_that_is_not_as_it_must_be_is_refused_with_position_and_reason(route, fault):
    spoil, reason = FAULTS[fault]
    reply = Reply(route)
    read_scores(route, reply.whole, ROWS, K, V)  # true until here
    spoil(reply)
    with pytest.raises(ReplyError, match=reason) as caught:
        read_scores(route, reply.whole, ROWS, K, V)
    assert len(str(caught.value)) < 200
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("reply", [None, [], "no", 3, {}, {"choices": []}, {"error": {"message": "\x1b[31m no"}}])
@pytest.mark.parametrize("route", ROUTES)
def test_a_reply_of_another_shape_is_refused(route, reply):
    with pytest.raises(ReplyError, match="choices"):
        read_scores(route, reply, ROWS, K, V)


def test_a_missing_entry_shows_in_the_ranks():
    """Of two equal names in a JSON object the last is kept, and k entries are left of k + 1."""
    reply = Reply("prompt_logprobs")
    reply.drop(reply.names()[2])
    with pytest.raises(ReplyError, match=r"position 3 of 6: the ranks are not those of the most likely"):
        read_scores("prompt_logprobs", reply.whole, ROWS, K, V)


def test_ranks_and_log_probabilities_that_contradict_each_other_are_refused():
    reply = Reply("prompt_logprobs")
    first, second = (reply.at[3][str(token)] for token in reply.names()[:2])
    first["rank"], second["rank"] = second["rank"], first["rank"]
    with pytest.raises(ReplyError, match="position 3 of 6: the ranks are not those"):
        read_scores("prompt_logprobs", reply.whole, ROWS, K, V)


def test_of_an_echo_the_two_places_of_the_actual_token_must_agree():
    reply = Reply("echo")
    scores = reply.content["logprobs"]["token_logprobs"]
    scores[1:] = [*scores[2:], scores[-1]]
    with pytest.raises(ReplyError, match="position 2 of 6: token_logprobs and top_logprobs differ"):
        read_scores("echo", reply.whole, ROWS, K, V)


@pytest.mark.parametrize("route", ROUTES)
def test_reading_two_rows_of_512_tokens_with_64_entries_takes_less_than_their_json(route):
    rows = some_rows(513, 513, supervised=1.0, vocabulary=1000)
    text = json.dumps(true_reply(route, rows, some_scores(rows, vocabulary=1000), 64))
    taken = []
    for _ in range(3):
        begun = time.process_time()
        reply = json.loads(text)
        parsed = time.process_time()
        read_scores(route, reply, rows, 64, 1000)
        taken.append((parsed - begun, time.process_time() - parsed))
    parsing, reading = min(one for one, _ in taken), min(other for _, other in taken)
    assert reading < max(1.5 * parsing, 0.2), (parsing, reading)

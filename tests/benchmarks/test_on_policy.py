"""The work that the on-policy benchmark hands out is the same for everybody, because the weights decide it."""

import time

import pytest

from tests.benchmarks.on_policy import STOP, BareParts, OnPolicyCase, answer_lengths, make_model


@pytest.mark.parametrize("stopping", [False, True])
def test_each_answer_ends_where_the_case_says(stopping):
    case = OnPolicyCase(24, stopping=stopping, student=(128, 2), teacher=(128, 2), vocab=512)
    student, teacher = make_model(case, case.student, 1), make_model(case, case.teacher, 2)
    answers = BareParts(case, student, teacher, time.process_time)._sample()
    assert [len(answer) for answer in answers] == answer_lengths(case)
    assert [answer[-1] == STOP for answer in answers] == [length < case.new_tokens for length in answer_lengths(case)]


def test_half_of_the_rows_stop_in_the_first_quarter():
    lengths = answer_lengths(OnPolicyCase(192, stopping=True))
    assert sum(length <= 192 // 4 for length in lengths) == len(lengths) // 2
    assert min(lengths) >= 192 // 8

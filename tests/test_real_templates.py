"""Every chat template that trl ships, on tokenizers that people train. `make test-real`: it fetches 125 MB once."""

import os

import pytest

from tests.templates.real_tokenizers import INTEGRITY, CannotFetch, real_tokenizer

pytestmark = pytest.mark.real


@pytest.fixture(scope="module", autouse=True)
def tokenizers():
    try:
        return {name: real_tokenizer(name) for name in INTEGRITY}
    except CannotFetch as error:
        if os.environ.get("CI", "").lower() in ("1", "true"):
            raise
        pytest.skip(str(error))


def test_the_tokenizers_are_the_published_ones(tokenizers):
    sizes = {name: len(tokenizer) for name, tokenizer in tokenizers.items()}
    assert sizes == {"qwen3": 151669, "gemma3": 262145, "llama3_1": 128256, "deepseek_v3": 128815, "gptoss": 200019}

"""The short form, of a minute: `make attack` goes on for as long as it is asked to."""

import pytest

from tests.attack.__main__ import attack


@pytest.mark.slow
def test_the_short_form_is_survived():
    tried, survived, _, wrong = attack(minutes=0, seed=0)
    assert not wrong, "\n".join(wrong)
    assert tried == survived and sum(tried.values()) > 150

"""Three tests of three outcomes, for the rehearsal of the step that runs tests. No suite collects this file."""

import pytest


def test_that_passes() -> None: ...


def test_that_fails() -> None:
    pytest.fail("as it should")


@pytest.mark.skip(reason="as it should be")
def test_that_is_skipped() -> None: ...

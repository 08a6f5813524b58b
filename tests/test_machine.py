"""What a manifest calls a processor."""

import pytest

from harness import machine


@pytest.mark.parametrize(
    ("name", "called"),
    [
        ("AMD EPYC", "AMD EPYC (family 25, model 17)"),  # as hypervisors say
        ("AMD EPYC 7763 64-Core Processor", "AMD EPYC 7763 64-Core Processor"),
        (None, "arm64"),
    ],
)
def test_a_hidden_processor_is_told_from_others_of_its_maker(
    name: str | None, called: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = {} if name is None else {"model name": [name], "cpu family": ["25"], "model\t": ["17"]}
    monkeypatch.setattr(machine, "cpu_info", lambda field: told.get(field, []))
    monkeypatch.setattr(machine.platform, "processor", lambda: "arm64")
    assert machine.machine()["processor"] == called

"""How a run is fanned out over Ray, which is no part of what the run is. Neither Ray nor torch is needed to say it."""

from typing import Annotated

from pydantic import Field, field_validator

from harness.records.spec import Frozen

Seconds = Annotated[float, Field(ge=1, lt=1e9)]


class FanOut(Frozen):
    address: str = "auto"  # `auto`, `local`, or that of a cluster's head
    workers: int | None = Field(default=None, ge=1, lt=10**9)  # None for as many as fit into the cluster now
    cpus: float = Field(default=1.0, ge=1, lt=1e9)
    gpus: float | None = Field(default=None, ge=0, lt=1e9)  # of a worker; None for one where the cluster has some
    autoscale: bool = False  # `workers` may be more than fit now: nodes will come
    timeout_s: Seconds = 3600.0  # of one sample with all its cells
    tries: int = Field(default=3, ge=1, lt=10**9)  # until a sample that kills its workers is given up
    start_s: Seconds = 900.0  # without any worker, until the run is given up

    @field_validator("gpus")
    @classmethod
    def _whole_above_one(cls, gpus: float | None) -> float | None:
        if gpus is not None and gpus > 1 and not gpus.is_integer():
            raise ValueError("above 1 it is a whole number")
        return gpus

    @property
    def threads(self) -> int:
        """CPU threads of a worker."""
        return int(self.cpus)

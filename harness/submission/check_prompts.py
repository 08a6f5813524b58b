"""The prompts of a submitted run, drawn again by its tasks with its model's tokenizer: what nobody may choose.

The tokenizer is that of the model whose revision, a hash of its files, the manifest states. A task whose data is not
here, or is not what the manifest says of it (another Python's standard library, another text), is not drawn: that is
told, and no fault. Of the others every record must be of a sample of the draw, with its prompt, references, meta and
no more tokens than it allows; and every sample of the draw must be there.
"""

import json
from collections.abc import Iterator, Set
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from harness.errors import HarnessError, checked
from harness.models.load import LoadedModel
from harness.plan.sweep import PlannedSample, plan_task, task_options
from harness.records.record import Record, RunManifest, by_turns
from harness.records.spec import Sweep
from tasks import load_tasks
from tasks.base import TaskError, TaskOptions


@dataclass
class Drawn:
    """samples: by task and id. tasks: those that were drawn again. notes: why others were not."""

    manifest: RunManifest
    samples: dict[tuple[str, str], PlannedSample] = field(default_factory=dict)
    tasks: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)

    def problems(self, record: Record) -> Iterator[str]:
        """Say in what a record is not of its task's draw."""
        if record.task not in self.tasks:
            return
        planned = self.samples.get((record.task, record.sample_id))
        if planned is None:
            yield f"{record.task} draws no sample {record.sample_id[:80]} with this seed"
            return
        wanted: dict[str, object] = {"prompt_sha256": planned.sha256, "prompt_tokens": len(planned.ids)}
        wanted |= {"answers": planned.sample.answers, "needle_tokens": len(planned.needle)}
        other = [name for name, value in wanted.items() if getattr(record, name) != value]
        if record.relayed is not None and record.relayed.text_bytes != len(planned.sample.context.encode()):
            other.append("text_bytes")
        meta = _json(planned.sample.meta)
        if {**meta, **record.meta} != meta:  # older runs have less
            other.append("meta")
        if other:
            yield f"{', '.join(other)} not those of the task's own draw"
        yield from self._too_long(record, planned)

    def _too_long(self, record: Record, planned: PlannedSample) -> Iterator[str]:
        cap, sample = self.manifest.spec.max_new_tokens, planned.sample
        own = [sample.max_new_tokens, *(turn.max_new_tokens for turn in sample.turns)]
        turns = by_turns(record.token_ids, record.turn_tokens)
        if len(turns) > len(own):
            yield f"{len(turns)} answers, the sample asks for {len(own)}"
        for ids, most in zip(turns, own, strict=False):
            if len(ids) > (most if cap is None else min(most, cap)):
                yield f"{len(ids)} tokens generated, the task allows {most}"
        if record.status == "ok" and record.nll_tokens != len(planned.answer):
            yield f"NLL over {record.nll_tokens} tokens, the reference has {len(planned.answer)}"

    def missing(self, seen: Set[tuple[str, str]]) -> Iterator[str]:
        """Say which samples of the draw are not there."""
        for task, sample in self.samples.keys() - seen:
            yield f"{task} draws sample {sample}, the run lacks it"


def draw_again(manifest: RunManifest, loaded: LoadedModel, *, data_dir: Path | None = None) -> Drawn:
    """Draw the samples of a run again. Raises HarnessError when the model is not the run's, by its revision."""
    spec = manifest.spec
    if loaded.spec.revision != spec.model.revision:
        theirs, ours = spec.model.revision[:12], loaded.spec.revision[:12]
        raise HarnessError(f"{loaded.spec.name} has revision {ours}, the run is of {theirs}; name the run's own model")
    same = {name: getattr(spec, name) for name in Sweep.model_fields.keys() & type(spec).model_fields.keys()}
    same |= {"model": loaded.spec.name, "tasks": tuple(task.name for task in spec.tasks)}
    same |= {"methods": ("fullkv",), "budgets": ("128",)}  # no part of a prompt
    sweep = checked(Sweep, same | {"data_dir": None if data_dir is None else str(data_dir)})
    options, found = task_options(sweep, loaded), Drawn(manifest)
    for name in sweep.tasks:
        _draw(found, name, options, loaded)
    return found


def _draw(found: Drawn, name: str, options: TaskOptions, loaded: LoadedModel) -> None:
    task, spec = load_tasks()[name], found.manifest.spec
    said = next(own.provenance for own in spec.tasks if own.name == name)
    try:
        own = replace(options, lengths=task.fitting(options))
        here = _json({**asdict(task.about), **task.provenance(own)})
        if other := [key for key in sorted(said) if key != "data" and said[key] != here.get(key)]:
            found.notes.append(f"prompts of {name}: {', '.join(other)} of its data are not the same here")
            return
        planned, _ = plan_task(task, own, loaded, spec.nll_tokens)
    except (HarnessError, TaskError) as error:
        found.notes.append(f"prompts of {name}: {error}")
        return
    found.tasks.add(name)
    found.samples |= {(name, sample.sample.id): sample for sample in planned}


def _json(value: Any) -> Any:
    """A value as a record has it, lists for tuples."""
    return json.loads(json.dumps(value))

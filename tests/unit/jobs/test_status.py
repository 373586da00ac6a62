"""The two tables, pair by pair, against literal ones written in another form."""

from __future__ import annotations

import itertools

import pytest

from jobs.errors import JobError, TransitionError
from jobs.status import ENDED, JobStatus, Verb, apply_verb, check_transition

ALLOWED = {
    "undefined": "created",
    "created": "running aborting null",
    "running": "paused ready waiting aborting",
    "paused": "running",
    "ready": "standby waiting aborting",
    "standby": "ready",
    "waiting": "pending aborting",
    "pending": "aborting concluded",
    "aborting": "aborting concluded",
    "concluded": "null",
    "null": "",
}
ALIVE = "created running paused ready standby"
ACCEPTED = {
    "cancel": f"{ALIVE} waiting pending",
    "pause": ALIVE,
    "resume": ALIVE,
    "set-speed": ALIVE,
    "complete": "ready standby",
    "finalize": "pending",
    "dismiss": "concluded",
    "change": ALIVE,
}


@pytest.mark.parametrize(("old", "new"), list(itertools.product(JobStatus, repeat=2)))
def test_every_pair_of_statuses(old: JobStatus, new: JobStatus) -> None:
    if new.value in ALLOWED[old.value].split():
        check_transition("j", old, new)
    else:
        with pytest.raises(TransitionError, match=f"job 'j' cannot go from '{old.value}' to '{new.value}'"):
            check_transition("j", old, new)


@pytest.mark.parametrize(("verb", "status"), list(itertools.product(Verb, JobStatus)))
def test_every_verb_in_every_status(verb: Verb, status: JobStatus) -> None:
    if status.value in ACCEPTED[verb.value].split():
        apply_verb("j", status, verb)
        return
    with pytest.raises(JobError) as refused:
        apply_verb("j", status, verb)
    assert (
        str(refused.value) == f"Job 'j' in state '{status.value}' cannot accept command verb '{verb.value}'"
    )


def test_names_are_those_of_the_control_socket() -> None:
    assert [status.value for status in JobStatus] == list(ALLOWED)
    assert [verb.value for verb in Verb] == list(ACCEPTED)


def test_ended_are_the_statuses_after_the_work() -> None:
    assert {status.value for status in ENDED} == {"waiting", "pending", "aborting", "concluded", "null"}

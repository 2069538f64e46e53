"""What the page does: each takes a form and the data folders that were named, and answers with plain values.

Whatever starts a program returns its command line too: it can be copied and typed instead.
"""

import os
import signal
from collections.abc import Callable
from typing import Any

from infer.resident.state import read_state
from train.state.requests import KINDS, ask
from train.watch import jobs
from train.watch.captions import undo, write_caption
from train.watch.commands import shown, text_of, train_words
from train.watch.places import RefusedError, data_folder, run_folder
from train.watch.run_commands import choose_words, draw_words, go_on_words, look_words
from train.watch.states import holder
from train.watch.survey import survey_name, survey_words

Form = dict[str, Any]


def words_of(form: Form, named: list[str]) -> tuple[list[str], str]:
    """The command that a form means, and the run that it is about."""
    what, run = text_of(form, "what", 20), text_of(form, "run", 200)
    if what == "train":
        return train_words(form, named), run
    if what == "look":
        return look_words(train_words(form, named)), run
    if what == "survey":
        words = survey_words(form, named)
        return words, survey_name(text_of(form, "folder"))
    if what == "draw":
        return draw_words(form), run
    if what == "choose":
        return choose_words(form), run
    if what == "go on":
        return go_on_words(run), run
    raise RefusedError(f"{what!a} is nothing that can be started; choose train, look, survey, draw, choose or go on")


def command(form: Form, named: list[str]) -> dict[str, Any]:
    """The command line of a form, without doing it."""
    words, _ = words_of(form, named)
    return {"command": shown(words)}


def start(form: Form, named: list[str]) -> dict[str, Any]:
    """Start what a form means, in the queue or at once."""
    words, run = words_of(form, named)
    when = text_of(form, "when", 10) or "queue"
    if when not in ("queue", "now"):
        raise RefusedError(f"when is {when!a}; choose queue or now")
    if words[0] == "train/train.py":
        refuse_running(run)
    return {"job": jobs.submit(words, run, when == "queue"), "command": shown(words)}


def refuse_running(run: str) -> None:
    """Raises:
    RefusedError: the run is being trained, or waits for it.
    """
    for job in jobs.list_jobs():
        if job["run"] == run and job["words"][0] == "train/train.py" and job["state"] in ("waiting", "running"):
            raise RefusedError(f"run {run!a} is {job['state']} already")
    try:
        folder = run_folder(run)
    except RefusedError:
        return  # a new one
    if holder(folder)[1]:
        raise RefusedError(f"run {run!a} is being trained already")


def steer(form: Form, named: list[str]) -> dict[str, Any]:
    """Ask a run that is being trained to stop, to save or to draw its previews."""
    run, do = text_of(form, "run", 200), text_of(form, "do", 20)
    if do not in KINDS:
        raise RefusedError(f"{do!a} is nothing that a run can be asked for; choose {', '.join(KINDS)}")
    folder = run_folder(run)
    if not holder(folder)[1]:
        raise RefusedError(f"run {run!a} is not being trained any more")
    ask(folder, do)
    return {"asked": do, "command": f"mkdir -p {folder}/requests && touch {folder}/requests/{do}"}


def cancel(form: Form, named: list[str]) -> dict[str, Any]:
    """Take a job out of the queue."""
    job = text_of(form, "job", 40)
    jobs.cancel(job)
    return {"cancelled": job}


def resume(form: Form, named: list[str]) -> dict[str, Any]:
    """Let the queue go on after the machine was off."""
    jobs.start_runner()
    return {"resumed": True}


def give_back(form: Form, named: list[str]) -> dict[str, Any]:
    """End the drawing process, which gives its memory back after the picture that it draws."""
    said = read_state()
    if said is None or said["state"] in ("ended", "gone"):
        raise RefusedError("there is no drawing process")
    os.kill(int(said["pid"]), signal.SIGTERM)
    return {"asked": "end", "command": f"kill {said['pid']}"}


def caption(form: Form, named: list[str]) -> dict[str, Any]:
    """Write a picture's captions."""
    folder, name = data_folder(named, text_of(form, "folder")), text_of(form, "name")
    was, texts = form.get("was"), form.get("captions")
    for value in (was, texts):
        if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
            raise RefusedError("captions are no list of texts")
    assert was is not None and texts is not None
    write_caption(folder, name, was, texts)
    return {"written": name}


def take_back(form: Form, named: list[str]) -> dict[str, Any]:
    """Undo the last change of a caption in a folder."""
    return {"undone": undo(data_folder(named, text_of(form, "folder")))}


ACTIONS: dict[str, Callable[[Form, list[str]], dict[str, Any]]] = {
    "command": command,
    "start": start,
    "steer": steer,
    "cancel": cancel,
    "resume": resume,
    "giveback": give_back,
    "caption": caption,
    "undo": take_back,
}

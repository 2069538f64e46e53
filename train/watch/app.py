"""The page's server: what it answers, each from files, with nothing kept but what was read already."""

import io
import shutil
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from infer.drawing.record import read_record
from infer.program.errors import reason
from infer.report.page import asset as report_asset
from infer.report.plot import STYLE as COLOURS
from infer.resident.state import read_state
from infer.sample.picture import decode
from train.watch import captions, jobs, survey
from train.watch.actions import ACTIONS
from train.watch.commands import KINDS, models, presets
from train.watch.curves import curves
from train.watch.guard import FOREIGN, Guard
from train.watch.places import RefusedError, data_folder, data_folders, is_private, run_folder, runs_folder, within
from train.watch.runs import describe, difference, list_runs, picture_losses
from train.watch.settings import Page
from train.watch.story import story

ASSETS = Path(__file__).parent / "assets"
TYPES = {".html": "text/html; charset=utf-8", ".js": "text/javascript; charset=utf-8", ".css": "text/css"}
SHOWN = {".png": "image/png", ".jpg": "image/jpeg", ".webp": "image/webp", ".html": "text/html; charset=utf-8"}
"""Files of runs/ that are sent, by their endings."""
SIDE = 384  # pixels of a thumbnail's longest side
KEPT = 400  # thumbnails that are remembered
LOW = 2 * 2**30  # bytes free on the disk of runs/ below which the page warns


def make_app(options: Page, token: str) -> Guard:
    """The server's application, guarded."""
    routes = [
        Route("/", index),
        Route("/static/{name}", static),
        Route("/files/{name:path}", run_file),
        Route("/picture", picture),
        Route("/crop", cropped),
        Route("/api/runs", answer(lambda request: overview())),
        Route("/api/run", answer(lambda request: run_of(_one(request, "name")))),
        Route("/api/curves", answer(lambda request: curves(_one(request, "name")))),
        Route("/api/losses", answer(lambda request: picture_losses(_one(request, "name")))),
        Route("/api/diff", answer(lambda request: difference(_one(request, "name"), _one(request, "other")))),
        Route("/api/jobs", answer(lambda request: jobs_of(_one(request, "run")))),
        Route("/api/job", answer(lambda request: one_job(_one(request, "id")))),
        Route("/api/story", answer(lambda request: story(_one(request, "name")))),
        Route("/api/record", answer(lambda request: recorded(_one(request, "name")))),
        Route("/api/form", answer(lambda request: form(options))),
        Route("/api/data", answer(lambda request: pictures_of(options, _one(request, "folder")))),
        Route("/api/survey", answer(lambda request: survey_of(options, _one(request, "folder")))),
        *(Route(f"/api/{name}", action(options, name), methods=["POST"]) for name in ACTIONS),
    ]
    app = Starlette(routes=routes, exception_handlers={Exception: broken, HTTPException: absent})
    app.state.options = options
    return Guard(app, token)


def _one(request: Request, name: str) -> str:
    given = request.query_params.getlist(name)
    if len(given) != 1 or len(given[0]) > 2000:
        raise RefusedError(f"give {name} once")
    return given[0]


def answer(find: Callable[[Request], Any]) -> Callable[[Request], Response]:
    """A route that answers with JSON, or with what is wrong."""

    def route(request: Request) -> Response:
        try:
            return JSONResponse(find(request))
        except RefusedError as error:
            return JSONResponse({"error": str(error)}, 400)

    return route


def action(options: Page, name: str) -> Callable[[Request], Any]:
    """A route that does something with a form."""
    from starlette.concurrency import run_in_threadpool

    async def route(request: Request) -> Response:
        try:
            given = await request.json()
        except (ValueError, RecursionError):
            return JSONResponse({"error": "the request is no JSON"}, 400)
        if not isinstance(given, dict):
            return JSONResponse({"error": "the request is no form"}, 400)
        try:
            return JSONResponse(await run_in_threadpool(ACTIONS[name], given, options.folders))
        except RefusedError as error:
            return JSONResponse({"error": str(error)}, 400)
        except OSError as error:  # a full disk, a folder that cannot be written
            return JSONResponse({"error": reason(error) or str(error)}, 500)

    return route


async def broken(request: Request, error: Exception) -> Response:
    said = reason(error) or f"a defect of this page: {type(error).__name__}: {error}"
    return JSONResponse({"error": said}, 500)


async def absent(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return PlainTextResponse(error.detail, error.status_code)


def index(request: Request) -> Response:
    return Response((ASSETS / "index.html").read_bytes(), media_type=TYPES[".html"])


def static(request: Request) -> Response:
    name = request.path_params["name"]
    if name == "page.css":
        return Response(report_asset("page.css") + COLOURS, media_type=TYPES[".css"])
    known = {file.name: file for file in ASSETS.iterdir() if file.suffix in TYPES}
    if name not in known:
        return PlainTextResponse("not found", 404)
    return Response(known[name].read_bytes(), media_type=TYPES[known[name].suffix])


def run_file(request: Request) -> Response:
    """A picture or a report within runs/; with ?small a thumbnail of the picture."""
    name = request.path_params["name"]
    try:
        file = within(runs_folder(), name)
    except RefusedError as error:
        return PlainTextResponse(str(error), 403)
    kind = SHOWN.get(file.suffix.lower())
    if kind is None or is_private(file.parts) or file.parts[1:2] == ("cache",):
        return PlainTextResponse("this kind of file is not shown", 403)
    if not file.is_file():
        return PlainTextResponse("it is not there any more", 404)
    if file.suffix.lower() == ".html":
        return Response(file.read_bytes(), media_type=kind, headers={"content-security-policy": FOREIGN})
    if "small" in request.query_params:
        return _thumbnail(file)
    return FileResponse(file, media_type=kind, headers={"cache-control": "no-cache"})


def picture(request: Request) -> Response:
    """A training picture as a thumbnail."""
    try:
        folder = data_folder(request.app.state.options.folders, _one(request, "folder"))
        file = within(folder, _one(request, "name"))
    except RefusedError as error:
        return PlainTextResponse(str(error), 403)
    if not file.is_file():
        return PlainTextResponse("it is not there any more", 404)
    return _thumbnail(file)


def cropped(request: Request) -> Response:
    """A training picture's crop as it is trained, small."""
    try:
        folder = data_folder(request.app.state.options.folders, _one(request, "folder"))
        shown = survey.crop(folder, _one(request, "name"), survey.view_of(_one(request, "view")))
    except RefusedError as error:
        return PlainTextResponse(str(error), 403)
    except ValueError as error:
        return PlainTextResponse(str(error), 415)
    return Response(_webp(shown), media_type="image/webp", headers={"cache-control": "private, max-age=60"})


_thumbnails: OrderedDict[tuple[str, int, int], bytes] = OrderedDict()
_remembering = threading.Lock()


def _thumbnail(file: Path) -> Response:
    status = file.stat()
    key = (str(file), status.st_mtime_ns, status.st_size)
    with _remembering:
        content = _thumbnails.get(key)
    if content is None:
        try:
            small = decode(file.read_bytes(), file.name)
        except ValueError as error:
            return PlainTextResponse(str(error), 415)
        small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        content = _webp(small)
        with _remembering:
            _thumbnails[key] = content
            while len(_thumbnails) > KEPT:
                _thumbnails.popitem(last=False)
    return Response(content, media_type="image/webp", headers={"cache-control": "private, max-age=60"})


def _webp(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=85)
    return buffer.getvalue()


def overview() -> dict[str, Any]:
    """The list of runs, the jobs, and what is amiss with the disk."""
    (runs, reports), listed = list_runs(), jobs.list_jobs()
    notes = []
    folder = runs_folder() if runs_folder().is_dir() else Path()
    free = shutil.disk_usage(folder).free
    if free < LOW:
        notes.append(f"the disk of runs/ has {free / 2**20:.0f} MiB left: free some space, or runs will stop")
    waiting = any(job["queued"] and job["state"] == "waiting" for job in listed)
    working = any(job["queued"] and job["state"] == "running" for job in listed)
    standstill = waiting and not working
    return {
        "runs": runs,
        "reports": reports,
        "jobs": listed,
        "notes": notes,
        "standstill": standstill,
        "resident": read_state(),
    }


def run_of(name: str) -> dict[str, Any]:
    """A run, which may wait in the queue or be starting."""
    training = (job for job in jobs.list_jobs() if job["run"] == name and job["words"][0] == "train/train.py")
    begun = next((job["state"] for job in training if job["state"] in ("waiting", "running")), None)
    return describe(name, begun)


def jobs_of(run: str) -> dict[str, Any]:
    """The jobs that are about a run."""
    return {"jobs": [job for job in jobs.list_jobs() if job["run"] == run], "resident": read_state()}


def one_job(job: str) -> dict[str, Any]:
    folder = jobs.job_folder(job)
    return {**jobs.read_job(folder), "log": jobs.read_log(folder)}


def recorded(name: str) -> dict[str, Any]:
    """What a drawn picture says of its settings."""
    run, _, rest = name.partition("/drawn/")
    file = within(run_folder(run), f"drawn/{rest}")
    try:
        return dict(read_record(file)["settings"])
    except ValueError as error:
        raise RefusedError(str(error)) from error


def form(options: Page) -> dict[str, Any]:
    """What the form of a training offers."""
    return {
        "models": models(),
        "presets": presets(),
        "kinds": {name: title for name, (title, _) in KINDS.items()},
        "folders": list(data_folders(options.folders)),
    }


def survey_of(options: Page, name: str) -> dict[str, Any]:
    """What a look at a folder found, and the job that looks."""
    data_folder(options.folders, name)
    run = survey.survey_name(name)
    job = next((job for job in jobs.list_jobs() if job["run"] == run), None)
    return {"found": survey.read_survey(name), "job": job, "page": f"{run}/data.html"}


def pictures_of(options: Page, name: str) -> dict[str, Any]:
    folder = data_folder(options.folders, name)
    return {"folder": name, **captions.list_pictures(folder), "undo": captions.undoable(folder)}

"""An endpoint that takes a photograph and answers with its instances as JSON.

pip install sparsespec fastapi uvicorn
python fastapi_endpoint.py
curl --data-binary @photograph.jpg http://127.0.0.1:8000/instances
"""

import asyncio
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel
from starlette.requests import ClientDisconnect

from sparsespec import Backbone, Segmenter
from sparsespec.backbone import BusyError
from sparsespec.formats import instance_annotations
from sparsespec.images import ImageReadError, read_image

MAX_BYTES = 20_000_000
MAX_PIXELS = 50_000_000
UPLOAD_SECONDS = 30
MAX_WAITING = 16


class Instance(BaseModel):
    """One object; `segmentation` is COCO's run-length encoding, which pycocotools and formats.decode_rle read."""

    label: int
    score: float
    bbox: list[int]
    area: int
    segmentation: dict[str, Any]


class Answer(BaseModel):
    width: int
    height: int
    instances: list[Instance]


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, Any]]:
    # One session and one copy of the weights for all requests. With one thread for each image, as many images are at
    # work as there are processors. MAX_WAITING is below the 40 threads of the pool, so none is ever missing.
    segmenter = Segmenter(Backbone(threads=1, max_waiting=MAX_WAITING))
    await run_in_threadpool(segmenter.warm_up)  # so that the first caller does not wait for it
    yield {"segmenter": segmenter}


app = FastAPI(title="Instances", lifespan=lifespan)


@app.post("/instances", responses={408: {}, 413: {}, 422: {}, 429: {}})
async def instances(request: Request) -> Answer:
    # The body is the file itself. A form would be taken in whole, however large, before this function is asked.
    with tempfile.TemporaryDirectory() as folder:
        upload = Path(folder, "upload")  # on disk: those who wait for their turn hold no pixels and no bytes
        try:
            async with asyncio.timeout(UPLOAD_SECONDS):
                await save_body(request, upload)
        except TimeoutError:
            raise HTTPException(408, f"the upload took more than {UPLOAD_SECONDS} seconds") from None
        except ClientDisconnect:  # nobody reads this answer, but the log is spared a traceback
            raise HTTPException(400, "the upload broke off") from None
        try:
            return await run_in_threadpool(segmented, request.state.segmenter, upload)
        except BusyError:
            raise HTTPException(429, "busy, try again in a few seconds", headers={"Retry-After": "5"}) from None
        except ImageReadError as error:  # its whole text names our temporary file, and advises us and not the caller
            raise HTTPException(422, error.reason) from None


async def save_body(request: Request, path: Path) -> None:
    size = 0
    with path.open("wb") as file:
        async for chunk in request.stream():
            size += len(chunk)  # counted, since a Content-Length may be missing or wrong
            if size > MAX_BYTES:
                raise HTTPException(413, f"the photograph has more than {MAX_BYTES} bytes")
            file.write(chunk)


def segmented(segmenter: Segmenter, path: Path) -> Answer:
    with segmenter.backbone.turn():  # decoding is part of the turn: it takes memory too
        image = read_image(path, max_pixels=MAX_PIXELS)
        result = segmenter(image)
    height, width = result.labels.shape
    found = instance_annotations(result.labels, result.scores)
    return Answer(width=width, height=height, instances=[Instance.model_validate(instance) for instance in found])


if __name__ == "__main__":
    import uvicorn

    uvicorn.run(app, limit_concurrency=100)

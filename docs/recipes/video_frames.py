"""Follow instances through the frames of a video, one frame at a time.

python video_frames.py [VIDEO | FOLDER_OF_FRAMES] [--output FILE.gif]
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import imageio.v3 as imageio
import numpy as np
import numpy.typing as npt

import sparsespec
from sparsespec.batch import InputsError, find_inputs
from sparsespec.formats import instance_annotations, render_overlay
from sparsespec.formats.tracks import Linker
from sparsespec.images import read_image

Frame = npt.NDArray[np.uint8]


def frames_of(source: str) -> Iterator[Frame]:
    if Path(source).is_file():
        # A GIF as it is; mp4 and the like need `pip install 'imageio[pyav]'`.
        for frame in imageio.imiter(source):
            yield frame[..., :3]
    else:
        inputs = find_inputs(source)
        for name in inputs.images:
            yield read_image(Path(inputs.root, name))


def pan(photograph: Frame, frames: int, step: int) -> Iterator[Frame]:
    """Move over a photograph, as a video to try this with."""
    width = photograph.shape[1] - frames * step
    for number in range(frames):
        yield photograph[:, number * step : number * step + width]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("video", nargs="?", help="without one, a camera moves over docs/examples/coins.jpg")
    parser.add_argument("--output", type=Path, default=Path("followed.gif"))
    parser.add_argument("--frames", type=int, default=5, help="of the video that is made")
    args = parser.parse_args(arguments)

    segmenter = sparsespec.Segmenter()
    linker = Linker()  # remembers the last mask of each track, nothing else: a video may be endless
    drawn: list[Any] = []
    seen: dict[int, int] = {}
    try:
        if args.video is None:
            frames = pan(read_image("docs/examples/coins.jpg"), args.frames, step=12)
        else:
            frames = frames_of(args.video)
        for number, frame in enumerate(frames):
            result = segmenter(frame)
            tracks = linker.add(instance_annotations(result.labels, result.scores))
            for track in tracks:
                seen[track] = seen.get(track, 0) + 1
            print(f"frame {number}: tracks {tracks}", flush=True)
            # Colours belong to labels. A label image of track numbers keeps the colour of an object.
            of_label = np.array([0, *tracks])
            scores = np.zeros(max(seen, default=0))
            scores[np.array(tracks, int) - 1] = result.scores
            drawn.append(render_overlay(frame, of_label[result.labels], scores, max_side=480))
    except (InputsError, ValueError, OSError) as error:
        parser.error(str(error))
    imageio.imwrite(args.output, drawn, duration=250, loop=0)
    print(f"{len(seen)} tracks in {len(drawn)} frames, the longest of {max(seen.values(), default=0)}: {args.output}")


if __name__ == "__main__":
    main()

"""Questions to a run, asked with pandas: which folders, which photographs, which instances.

pip install sparsespec pandas
python pandas_table.py [RUN]
"""

import argparse
import json
from pathlib import Path, PurePosixPath

import pandas as pd

import sparsespec
from sparsespec.batch import Formats, InputsError, find_inputs, run_batch


def read_run(run: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Give the photographs of a run, those that failed too, and their instances."""
    photographs = pd.DataFrame(json.loads((run / "run.json").read_bytes())["images"])
    photographs["image_id"] = range(1, len(photographs) + 1)  # the number that instances know their photograph by
    photographs["folder"] = [PurePosixPath(path).parent.as_posix() for path in photographs["path"]]
    photographs["seconds"] = [seconds.get("total") for seconds in photographs["seconds"]]
    if (run / "instances.parquet").exists():
        instances = pd.read_parquet(run / "instances.parquet")
    elif (run / "instances.csv").exists():
        instances = pd.read_csv(run / "instances.csv")
    else:
        raise FileNotFoundError(f"no table of instances in {run}: give `sparsespec run` the option --table csv")
    return photographs, instances


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", nargs="?", type=Path, default=Path("table-run"), help="made of --input if not there")
    parser.add_argument("--input", default="docs/examples")
    args = parser.parse_args(arguments)
    try:
        if not args.run.exists():
            run_batch(sparsespec.Segmenter(), find_inputs(args.input), args.run, formats=Formats(table="csv"))
        photographs, instances = read_run(args.run)
    except (InputsError, OSError) as error:
        parser.error(str(error))

    instances["share"] = instances["area"] / (instances["image_width"] * instances["image_height"])
    instances["cut off"] = (
        (instances["x"] == 0)
        | (instances["y"] == 0)
        | (instances["x"] + instances["width"] == instances["image_width"])
        | (instances["y"] + instances["height"] == instances["image_height"])
    )

    # Joined from the photographs' side: the table of instances does not know those in which nothing was found.
    sums = instances.groupby("image_id").agg(best=("score", "max"), covered=("share", "sum"))
    photographs = photographs.join(sums, on="image_id")
    folders = photographs.groupby("folder").agg(
        photographs=("path", "size"),
        failed=("status", lambda status: (status == "failed").sum()),
        empty=("instances", lambda count: (count == 0).sum()),
        instances=("instances", "sum"),
        best=("best", "median"),
        covered=("covered", "median"),
        seconds=("seconds", "mean"),
    )
    sure = instances[(instances["score"] >= 0.4) & ~instances["cut off"]].sort_values("score", ascending=False)
    shown = sure[["file_name", "label", "score", "share", "centroid_x", "centroid_y"]].head(10)

    print(folders.round(2).to_string())
    print(f"\n{len(sure)} of {len(instances)} instances are whole and have a score of at least 0.4. The best:")
    print(shown.round(2).to_string(index=False))

    page = args.run / "photographs.html"
    # Names are escaped; the links lead to the overlays beside the page.
    table = photographs[["path", "status", "instances", "best", "covered", "seconds", "overlay", "error"]]
    page.write_text(table.sort_values("best").to_html(index=False, render_links=False, na_rep=""), encoding="utf-8")
    print(f"\nall photographs, the doubtful ones first: {page}")


if __name__ == "__main__":
    main()

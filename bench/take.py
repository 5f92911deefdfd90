"""Take the results of the GPU suite into bench/results/gpu-NAME, from where `report.py` puts them into the README.

python bench/take.py DIR
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from pathlib import Path

from gpu_parts import PARTS

RESULTS = Path(__file__).parent / "results"


def taken(folder: Path, results: Path = RESULTS) -> Path:
    """Copy every part; the folder of an earlier run on such a GPU goes, so that no two runs are mixed.

    Raises:
        SystemExit: there is nothing, or nothing of a GPU, or a part was of tiny sizes.
    """
    found = {part: path for part in PARTS if (path := folder / f"{part}.json").exists()}
    kept = [json.loads(path.read_text()) for path in found.values()]
    names = {part["machine"]["gpu"] for part in kept if part["machine"]}
    if len(names) != 1 or None in names or any(part.get("tiny") for part in kept):
        raise SystemExit(f"{folder}: holds no figures of one GPU (make gpu OUT={folder} makes them)")
    name = re.sub(r"[^a-z0-9]+", "-", names.pop().lower()).strip("-")
    target = results / f"gpu-{name}"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for part, path in found.items():
        shutil.copy(path, target / f"{part}.json")
    return target


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    print(taken(parser.parse_args().folder))

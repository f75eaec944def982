"""A clinician's session with default settings: ten objects of 512 x 512 x 400, each a box and three clicks.

::

    python tests/benchmarks/prompt_session.py [--weights mobile_sam.pt] [--out FILE.json]

Wall seconds of every prompt on this machine's cores, CPU seconds, and the peak memory of the whole process.
The volume is drawn: ellipsoids with soft, noisy edges in noise, at CT values. The clicks go where the mask is
most wrong. A machine that does other work beside shows it in the wall seconds.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
from measure import measure, parser, rounded

from medseg.prompt.cases import world_box, world_point
from medseg.prompt.regions import Region
from medseg.prompt.session import PromptSession
from medseg.prompt.simulate import draw_prompt, next_click
from medseg.types import BoolArray
from medseg.volume import Geometry, Volume

SHAPE, QUICK_SHAPE = (512, 512, 400), (256, 256, 60)
SPACING = (0.8, 0.8, 1.0)
OBJECTS, CLICKS = 10, 3


def draw(shape: tuple[int, int, int]) -> tuple[Volume, list[Region]]:
    """Return the volume and its objects, side by side in two rows."""
    rng = np.random.default_rng(0)
    array = rng.normal(20, 15, shape).astype(np.int16)
    objects = []
    for number in range(OBJECTS):
        radii = rng.uniform(0.4, 1.0, 3) * (shape[0] / 12, shape[1] / 5, shape[2] / 3)
        middle = np.array([(number % 5 + 0.5) / 5, (number // 5 + 0.5) / 2, 0.5]) * shape
        start = np.maximum(np.floor(middle - radii), 0).astype(int)
        stop = np.minimum(np.ceil(middle + radii) + 1, shape).astype(int)
        part = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
        inside = _ellipsoid(part, middle, radii)
        array[part][inside] += 90
        objects.append(Region.at(inside, (int(start[0]), int(start[1]), int(start[2])), shape))
    affine = np.diag([*SPACING, 1.0])
    return Volume(array[None], Geometry(shape, affine)), objects


def _ellipsoid(part: tuple[slice, ...], middle: np.ndarray, radii: np.ndarray) -> BoolArray:
    away = [((np.arange(p.start, p.stop) - m) / r) ** 2 for p, m, r in zip(part, middle, radii, strict=True)]
    return np.asarray(away[0][:, None, None] + away[1][:, None] + away[2] <= 1)


def work(weights: Path | None, shape: tuple[int, int, int]) -> dict[str, object]:
    """Do the session; return what each prompt took."""
    volume, objects = draw(shape)
    rng = np.random.default_rng(1)
    rows: dict[str, list[float]] = {"box": [], "click": [], "slice": [], "cpu_box": [], "cpu_click": []}
    dice = []
    given = None if weights is None else {"mobile-sam": weights}
    with PromptSession.open(volume, models=_models(given)) as session:
        for number, truth in enumerate(objects):
            name, scene = f"object {number + 1}", session.scene
            box = draw_prompt(truth.full(), 2, rng)
            wall, cpu = _timed(session, name, world_box(scene, box))
            mask = session.mask(name)
            rows["slice"].append(wall / max(1, mask.array.shape[2]))
            rows["box"].append(wall)
            rows["cpu_box"].append(cpu)
            for _ in range(CLICKS):
                click = next_click(truth, session.mask(name), 2, rng, 2.0, SPACING)
                if click is None:
                    break
                wall, cpu = _timed(session, name, world_point(scene, click, 2))
                rows["click"].append(wall)
                rows["cpu_click"].append(cpu)
            found = session.mask(name).full()
            dice.append(2 * (found & truth.full()).sum() / (found.sum() + truth.voxels))
    medians = {name: float(np.median(values)) for name, values in rows.items()}
    return {
        "median": rounded(medians),
        "first": round(rows["box"][0], 3),
        "dice": round(float(np.mean(dice)), 4),
    }


def _models(given: dict[str, Path] | None):  # type: ignore[no-untyped-def]
    from medseg.prompt.slicewise import Models

    return lambda scene: Models.open(scene, given=given)


def _timed(session: PromptSession, name: str, prompt) -> tuple[float, float]:  # type: ignore[no-untyped-def]
    wall, cpu = time.perf_counter(), time.process_time()
    session.add(name, prompt)
    return time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    """Run the session in a process of its own and print what it took."""
    options = argparse.ArgumentParser(parents=[parser(__doc__ or "", peers=False)], add_help=False)
    options.add_argument("--weights", type=Path, help="mobile_sam.pt; else it is fetched")
    options.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.inside:
        given.inside.write_text(json.dumps(work(given.weights, QUICK_SHAPE if given.quick else SHAPE)))
        return
    inside = Path(f"{given.out or 'prompt_session.json'}.part")
    command = [sys.executable, __file__, "--inside", str(inside), *(["--quick"] if given.quick else [])]
    cost = measure([*command, *(["--weights", str(given.weights)] if given.weights else [])])
    result = {**json.loads(inside.read_text()), "peak_pss_mb": round(cost.peak_pss_mb, 1)}
    inside.unlink()
    print(json.dumps(result, indent=1))
    if given.out:
        given.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

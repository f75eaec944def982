"""Label maps with many objects, made from a seed: what the metrics of objects are compared on.

Nothing but numpy, so that the environments of the peers can make the same maps.
"""

import hashlib

import numpy as np

Maps = tuple[np.ndarray, np.ndarray]


def random_objects(rng: np.random.Generator, shape: tuple[int, ...], n: int, radius: float) -> np.ndarray:
    """Paint `n` ellipsoids of random size; later ones cover earlier ones, so that many touch."""
    labels = np.zeros(shape, np.int32)
    grid = np.indices(shape)
    for label in range(1, n + 1):
        centre = rng.uniform(0, shape)
        radii = rng.uniform(0.5, 1.5, len(shape)) * radius
        far = sum(((x - c) / r) ** 2 for x, c, r in zip(grid, centre, radii, strict=True))
        labels[far <= 1.0] = label
    return labels


def disturbed(rng: np.random.Generator, labels: np.ndarray) -> np.ndarray:
    """Return a bad prediction: objects dropped, merged with the next, cut in two, moved, invented."""
    moved = np.roll(labels, rng.integers(-1, 2, labels.ndim), tuple(range(labels.ndim)))
    result = np.zeros_like(labels)
    fate = rng.choice(["keep", "keep", "keep", "drop", "merge", "cut"], labels.max() + 1)
    names = 1 + rng.permutation(2 * labels.max() + 8)
    for label in np.unique(labels[labels > 0]):
        mask = moved == label
        if fate[label] == "drop":
            continue
        result[mask] = names[label - (fate[label] == "merge")]
        if fate[label] == "cut" and mask.any():
            first = np.argwhere(mask)
            low = first[:, 0] < np.quantile(first[:, 0], rng.uniform(0.3, 0.7))
            result[tuple(first[low].T)] = names[labels.max() + label]
    invented = random_objects(rng, labels.shape, 3, 3.0)
    return np.where((result == 0) & (invented > 0), names[-1] + invented, result).astype(np.int32)


def pair(seed: int, shape: tuple[int, ...], n: int, radius: float) -> Maps:
    """Return a reference and a bad prediction of it."""
    rng = np.random.default_rng(seed)
    reference = random_objects(rng, shape, n, radius)
    return reference, disturbed(rng, reference)


def halves() -> Maps:
    """Return objects cut into equal halves (IoU exactly .5 twice), and a prediction that spans two."""
    reference, prediction = np.zeros((2, 12, 24), np.int32)
    reference[1:5, 1:9], prediction[1:5, 1:5], prediction[1:5, 5:9] = 1, 1, 2
    reference[6:10, 1:5], reference[6:10, 5:9], prediction[6:10, 1:9] = 2, 3, 3
    reference[2:8, 12:20], prediction[2:8, 13:21] = 4, 4
    return reference, prediction


def cases() -> dict[str, Maps]:
    """Return all maps by name."""
    touching = pair(1, (64, 80), 40, 7.0)
    gaps = pair(2, (50, 50), 15, 5.0)
    spread = np.array([0, *np.random.default_rng(3).choice(3000, 400, replace=False) + 1], np.int32)
    nothing = np.zeros_like(touching[0])
    one = np.pad(np.ones((4, 5), np.int32), ((2, 2), (2, 4)))
    full = 1 + np.arange(30)[:, None] // 5 * 6 + np.arange(36) // 6
    return {
        "touching_2d": touching,
        "crowded_2d": pair(4, (96, 96), 160, 5.0),
        "crowded_3d": pair(5, (24, 28, 32), 60, 4.0),
        "sparse_3d": pair(6, (30, 40, 40), 8, 4.0),
        "gaps_2d": (spread[gaps[0]], spread[gaps[1]]),
        "halves_2d": halves(),
        "no_background_2d": (full.astype(np.int32), np.roll(full, 1, 1).astype(np.int32)),
        "identical_2d": (touching[0], touching[0]),
        "one_object_2d": (one, np.pad(np.ones((4, 6), np.int32), ((2, 2), (2, 3)))),
        "reference_empty_2d": (nothing, touching[1]),
        "prediction_empty_2d": (touching[0], nothing),
        "both_empty_2d": (nothing, nothing),
    }


def digest(maps: tuple[np.ndarray, ...]) -> str:
    """Return a hash that changes when the maps do."""
    return hashlib.sha256(b"".join(np.ascontiguousarray(m, np.int32).tobytes() for m in maps)).hexdigest()[
        :16
    ]


def panoptic_classes(labels: np.ndarray, ground: str) -> np.ndarray:
    """Return the class of each voxel: things 1 and 2, every third object void (4), background 3 or void."""
    classes = np.where(labels % 3 == 0, 4, labels % 3)
    return np.where(labels == 0, 3 if ground == "stuff" else 4, classes)


def panoptic_image(seed: int, shape: tuple[int, ...]) -> tuple[Maps, Maps]:
    """Return classes and objects of a reference and of a bad prediction.

    Classes: background 0, two organs 1 and 2, things 3 and 4, and in the reference 9, which is void.
    """
    rng = np.random.default_rng(seed)
    objects, guessed = pair(seed, shape, 25, 4.0)
    grid = np.indices(shape)
    inside = sum(((x - n / 2) / (0.45 * n)) ** 2 for x, n in zip(grid, shape, strict=True)) < 1
    organs = np.where(inside, 1 + (grid[0] > shape[0] // 2), 0)
    semantic = np.where(objects > 0, 3 + objects % 2, organs)
    kinds = {}
    for label in np.unique(guessed[guessed > 0]):
        votes = np.bincount(semantic[guessed == label], minlength=5)[3:5]
        sure = votes.any() and rng.random() < 0.85
        kinds[label] = 3 + int(votes.argmax()) if sure else int(rng.integers(3, 5))
    table = np.array([kinds.get(label, 0) for label in range(guessed.max() + 1)])
    found = np.where(guessed > 0, table[guessed], np.roll(organs, 2, -1))
    void = tuple(slice(n // 2, 3 * n // 4) for n in shape)
    semantic[void], objects[void] = 9, 0
    return (semantic, objects), (found, guessed)


def panoptic_images() -> dict[str, list[tuple[Maps, Maps]]]:
    """Return sets of images whose counts are added up."""
    return {
        "2d": [panoptic_image(seed, (48 + seed, 56)) for seed in (11, 12, 13)],
        "3d": [panoptic_image(seed, (16, 24, 20 + seed)) for seed in (1, 2)],
    }


def scores_of(labels: np.ndarray) -> np.ndarray:
    """Return a score for each object, in order of the labels; rounded, so that there are ties."""
    n = len(np.unique(labels[labels > 0]))
    return np.round(np.random.default_rng(n).random(n), 2)

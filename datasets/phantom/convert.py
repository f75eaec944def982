"""Write the phantom dataset: ``python datasets/phantom/convert.py OUT [--cases N] [--only lesion]``."""

import argparse
from pathlib import Path

from medseg.phantom import write_phantom_dataset


def main() -> None:
    """Parse the command line and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="dataset folder to make, e.g. Dataset900_Phantom")
    parser.add_argument("--cases", type=int, default=14, help="training cases")
    parser.add_argument("--test-cases", type=int, default=4, help="cases with truth in labelsTs")
    parser.add_argument("--voxels", type=int, default=64, help="voxels across the body")
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--only", help="keep one label alone, e.g. lesion, to train a detector")
    given = parser.parse_args()
    counts = (given.cases, given.test_cases, given.seed, given.voxels)
    print(write_phantom_dataset(given.out, *counts, only=given.only))


if __name__ == "__main__":
    main()

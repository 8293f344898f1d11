"""``python -m kvlearn.grading``: write exercises/ from solutions/, and leave what somebody changed."""

import sys

from kvlearn.grading.catalogue import solutions_root
from kvlearn.grading.catalogue import unit_names as units
from kvlearn.grading.release import release


def main() -> None:
    solutions = solutions_root()
    exercises = solutions.parent / "exercises"
    written, left = release(solutions, exercises)
    for file in written:
        print(f"wrote {file.relative_to(exercises.parent)}")
    for file in left:
        name = file.relative_to(exercises.parent)
        print(
            f"left as it is: {name} differs from git's HEAD (delete it to have it made anew)", file=sys.stderr
        )
    print(f"{len(units(solutions))} units, {len(written)} files written, {len(left)} left as they are")


if __name__ == "__main__":
    main()

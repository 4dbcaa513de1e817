"""Grade a hand-in, or a class of them: `python -m grading --hand-in FOLDER --out FOLDER`."""

import argparse
import sys
import time
from pathlib import Path

from grading import grade as grader
from grading.hand_ins import grade_class


def main() -> None:
    """Grade, print the rubric, write the files; exit with 0 at or above the pass mark."""
    parser = argparse.ArgumentParser(description="Grade hand-ins by grading/rubric.toml.")
    add, root = parser.add_argument, grader.ROOT
    add("--hand-in", type=Path, default=root, help="its folder; the project itself unless given")
    add("--hand-ins", type=Path, help="a folder in which every folder is a hand-in; needs --out")
    add("--out", type=Path, help="folder for grade.json, grade.md and junit.xml (and grades.csv)")
    add("--quick", action="store_true", help="judge the module alone")
    given = parser.parse_args()
    start = time.monotonic()
    rubric = grader.read_rubric(quick=given.quick)
    if given.hand_ins:
        sys.exit(grade_class(given.hand_ins, given.out, rubric))
    hand_in = grader.read_hand_in(given.hand_in)
    grader.prepare()
    graded = grader.grade(hand_in, rubric, grader.expected_tests(rubric.criteria), workers=4)
    grader.show(graded)
    seconds = time.monotonic() - start
    print(f"{graded}: {'passed' if graded.passed else 'NOT passed'}, in {seconds:.0f} s.")
    if given.out:
        grader.write(given.out, graded, seconds)
    sys.exit(not graded.passed)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("Stopped: nothing more was graded.")

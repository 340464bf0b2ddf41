"""Writes a hand-out for a class: this project with the bodies of eight functions of randsac.py
taken out, which are seven exercises, and the tests that grade them.

    python tests/assignment.py --out DIR
"""

import argparse
import ast
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from randsac import Parser, check, run_command, user_path

EXERCISES = {  # number: section of the paper, functions of randsac.py
    1: ("3.1", ["patchify"]),
    2: ("3.2", ["square_segments"]),
    3: ("3.2", ["nearest_gaussian"]),
    4: ("3.3", ["serialize"]),
    5: ("4.1", ["attention_masks"]),
    6: ("4.2", ["mix_skips"]),
    7: ("5", ["normalize_patches", "token_loss"]),
}
FILES = [
    "README.md",
    "LICENSE",
    "CITATION.cff",
    "requirements.txt",
    "assets",
    "randsac.py",
    "probe.py",
    "visualize.py",
    "tests/conftest.py",
    "tests/test_exercises.py",
]


def find_functions(source):
    """-> the functions and methods of a program, {name: its syntax tree}."""
    nodes = ast.walk(ast.parse(source))
    return {node.name: node for node in nodes if isinstance(node, ast.FunctionDef)}


def take_out(source, exercises):
    """Source of randsac.py -> the same, where the bodies of these exercises are an error. Docstrings
    stay, comments between them and the body go."""
    functions = find_functions(source)
    bodies = []
    for number in exercises:
        section, names = EXERCISES[number]
        for name in names:
            docstring, *_, last = functions[name].body
            message = f"exercise {number} (Section {section}): write {name}, see its docstring"
            error = " " * docstring.col_offset + f'raise NotImplementedError("{message}")\n'
            bodies.append((docstring.end_lineno, last.end_lineno, error))

    # From the last to the first, as lines above keep their numbers.
    lines = source.splitlines(keepends=True)
    for first, end, error in sorted(bodies, reverse=True):
        lines[first:end] = [error]
    return "".join(lines)


def main(arguments):
    form = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=__doc__, formatter_class=form, allow_abbrev=False)
    words = "a new or empty directory"
    parser.add_argument("--out", type=user_path, required=True, metavar="DIR", help=words)
    out = parser.parse_args(arguments).out
    free = not out.exists() or (out.is_dir() and not any(out.iterdir()))
    check(free, f"{out} is there and not an empty directory: choose another --out")

    # Copy the project.
    for name in FILES:
        inside = (ROOT / name).rglob("*")  # of a folder
        for file in [ROOT / name, *inside]:
            if file.is_file():
                place = out / file.relative_to(ROOT)
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, place)

    # Take the exercises out, and say what to do next.
    source = (ROOT / "randsac.py").read_text(encoding="utf-8")
    (out / "randsac.py").write_text(take_out(source, EXERCISES), encoding="utf-8")
    print(f"{out} is the hand-out, with these exercises in its randsac.py:")
    for number, (section, names) in EXERCISES.items():
        print(f"  {number}  Section {section:4} {', '.join(names)}")
    print(f"Next: cd {out}")
    print("      pytest -m exercise1   # grades the first; fails until it is solved")
    print("      pytest                # grades all; when all pass, python randsac.py trains")


if __name__ == "__main__":
    run_command(main)

"""Writes a hand-out for a class: this project with nine functions of randsac.py emptied, which are
eight exercises, the tests that grade them, and ASSIGNMENT.md, which tells students what to do.

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
    1: ("3.1", ["patchify", "unpatchify"]),
    2: ("3.2", ["square_segments"]),
    3: ("3.2", ["nearest_gaussian"]),
    4: ("3.3", ["serialize"]),
    5: ("4.1", ["attention_masks"]),
    6: ("4.2", ["mix_skips"]),
    7: ("5", ["normalize_patches"]),
    8: ("5", ["token_loss"]),
}
# What is copied. Not the project's README, nor the explorer: they hold answers.
FILES = ["LICENSE", "CITATION.cff", "requirements.txt", "probe.py", "visualize.py"]
FILES += ["assets/nano-cifar10/*.*", "assets/nano-cifar10/images/*"]
FILES += ["assets/segments.png", "assets/hierarchy.png", "tests/test_exercises.py"]


def find_functions(source):
    """-> the functions and methods of a program, {name: its syntax tree}."""
    nodes = ast.walk(ast.parse(source))
    return {node.name: node for node in nodes if isinstance(node, ast.FunctionDef)}


def take_out(source):
    """Source of randsac.py -> the same, where the body of each exercise is an error. Docstrings
    stay, and comments between them and the body go."""
    functions = find_functions(source)
    bodies = []
    for number, (section, names) in EXERCISES.items():
        for name in names:
            docstring, *_, last = functions[name].body
            message = f"exercise {number} (Section {section}): write {name}, see its docstring"
            error = " " * docstring.col_offset + f'raise NotImplementedError("{message}")\n'
            bodies.append((docstring.end_lineno, last.end_lineno, error))

    # From the last to the first, so that the numbers of the lines above stay right.
    lines = source.splitlines(keepends=True)
    for first, end, error in sorted(bodies, reverse=True):
        lines[first:end] = [error]
    return "".join(lines)


def main(arguments):
    form = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=__doc__, formatter_class=form, allow_abbrev=False)
    parser.add_argument("--out", required=True, metavar="DIR", help="a new or empty directory")
    out = user_path(parser.parse_args(arguments).out)
    free = not out.exists() or (out.is_dir() and not any(out.iterdir()))
    check(free, f"{out} exists and is not an empty directory: choose another --out")

    # Copy what stays as it is.
    for name in FILES:
        for file in ROOT.glob(name):
            place = out / file.relative_to(ROOT)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, place)
    shutil.copyfile(ROOT / "tests/ASSIGNMENT.md", out / "ASSIGNMENT.md")

    # Take the exercises out.
    source = (ROOT / "randsac.py").read_text(encoding="utf-8")
    (out / "randsac.py").write_text(take_out(source), encoding="utf-8")

    # Tell pytest where randsac.py is, which marks there are, and to show no more than helps.
    settings = ["[pytest]", "pythonpath = .", "addopts = -q --tb=short --assert=plain", "markers ="]
    settings += [f"    exercise{number}: grades exercise {number} alone" for number in EXERCISES]
    (out / "pytest.ini").write_text("\n".join(settings) + "\n", encoding="utf-8")
    print(f"{out} is the hand-out: ASSIGNMENT.md tells students what to do.")
    print(f"Next: cd {out} && pytest   # fails until the exercises are solved")


if __name__ == "__main__":
    run_command(main)

"""Writes a hand-out for a class: this project with the bodies of seven exercises in randsac.py taken out, and the tests
that grade them.

    python tests/assignment.py --out DIR
"""
import argparse
import ast
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from randsac import check, run_command  # noqa: E402

EXERCISES = {  # number: section of the paper, functions of randsac.py
    1: ("3.1", ["patchify"]),
    2: ("3.2", ["square_segments"]),
    3: ("3.2", ["nearest_gaussian"]),
    4: ("3.3", ["serialize"]),
    5: ("4.1", ["attention_masks"]),
    6: ("4.2", ["mix_skips"]),
    7: ("5", ["normalize_patches", "token_loss"])}
FILES = ["README.md", "LICENSE", "CITATION.cff", "requirements.txt", "assets", "randsac.py", "probe.py",
         "visualize.py", "tests/conftest.py", "tests/test_exercises.py"]


def take_out(source, exercises):
    """Source of randsac.py -> the same, where the bodies of these exercises are an error. Docstrings stay."""
    functions = {node.name: node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)}
    lines = source.splitlines(keepends=True)
    for number in exercises:
        section, names = EXERCISES[number]
        for name in names:
            docstring, *body = functions[name].body
            first, end = docstring.end_lineno, body[-1].end_lineno  # comments between them go too
            message = f"exercise {number} (Section {section}): write {name}, as its docstring says"
            lines[first:end] = [" " * docstring.col_offset + f'raise NotImplementedError("{message}")\n']
            lines[first + 1:first + 1] = [""] * (end - first - 1)  # other functions keep their line numbers
    return "".join(lines)


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new or empty directory")
    out = parser.parse_args(arguments).out
    check(not out.exists() or out.is_dir() and not any(out.iterdir()),
          f"{out} is there and not an empty directory: choose another --out")
    for file in [file for name in FILES for file in (ROOT / name, *(ROOT / name).rglob("*")) if file.is_file()]:
        place = out / file.relative_to(ROOT)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, place)
    source = (ROOT / "randsac.py").read_text(encoding="utf-8")
    (out / "randsac.py").write_text(take_out(source, EXERCISES), encoding="utf-8")
    print(f"{out} is the hand-out, with these exercises in its randsac.py:")
    for number, (section, names) in EXERCISES.items():
        print(f"  {number}  Section {section:4} {', '.join(names)}")
    print(f"Next: cd {out}\n"
          f"      pytest -m exercise1   # grades the first; fails until it is solved\n"
          f"      pytest                # grades all; when all pass, python randsac.py trains")


if __name__ == "__main__":
    run_command(main)

"""The assignment: what the hand-out holds, that each exercise is graded alone, that wrong answers
fail and other right ones pass."""

import ast
import functools
import importlib.util
import os
import re
import subprocess
import sys
import types

import pytest
from assignment import EXERCISES, ROOT, find_functions, main, take_out
from conftest import command

import randsac

SOURCE = (ROOT / "randsac.py").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def hand_out(tmp_path_factory):
    out = tmp_path_factory.mktemp("class") / "new" / "hand-out"
    result = command("tests/assignment.py", "--out", out, cwd=out.parent.parent)
    assert result.returncode == 0, result.stderr
    assert f"cd {out}" in result.stdout  # what to do next
    assert "pytest -m exercise1" in result.stdout
    return out


def load_grader(path):
    """-> the grader as a module, its tests as {number of the exercise: [function]}."""
    spec = importlib.util.spec_from_file_location("grader", path)
    grader = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(grader)
    tests = {number: [] for number in EXERCISES}
    for name, test in vars(grader).items():
        if name.startswith("test_"):
            (mark,) = test.pytestmark  # every test grades exactly one exercise
            tests[int(mark.name.removeprefix("exercise"))].append(test)
    return grader, tests


@functools.cache
def load_solution(source):
    solution = types.ModuleType("solution")
    exec(compile(source, "solution.py", "exec"), vars(solution))  # noqa: S102
    return solution


def grade(hand_out, source, number):
    """Grades one exercise of this randsac.py -> {name of a test: what it raised, or None}. Here, as
    a process takes seconds."""
    grader, tests = load_grader(hand_out / "tests/test_exercises.py")
    grader.randsac = load_solution(source)
    raised = {}
    for test in tests[number]:
        raised[test.__name__] = None
        try:
            test()
        except (Exception, pytest.fail.Exception) as error:  # noqa: BLE001 (a student's)
            raised[test.__name__] = error
    return raised


def all_pass(raised):
    return len(raised) > 0 and not any(raised.values())


# --- the hand-out


def test_hand_out_is_the_project_without_eight_bodies(hand_out):
    files = {f.relative_to(hand_out).as_posix() for f in hand_out.rglob("*") if f.is_file()}
    assets = {f.relative_to(ROOT).as_posix() for f in (ROOT / "assets").rglob("*") if f.is_file()}
    programs = {"randsac.py", "probe.py", "visualize.py"}
    papers = {"README.md", "LICENSE", "CITATION.cff", "requirements.txt"}
    grading = {"tests/conftest.py", "tests/test_exercises.py"}
    assert files == assets | programs | papers | grading
    for name in files - {"randsac.py"}:
        assert (hand_out / name).read_bytes() == (ROOT / name).read_bytes()


def test_only_the_bodies_of_the_exercises_are_gone(hand_out):
    names = [name for _, names in EXERCISES.values() for name in names]
    assert len(names) == 8
    everything = [n.name for n in ast.walk(ast.parse(SOURCE)) if isinstance(n, ast.FunctionDef)]
    gone = set()
    for name in names:
        assert everything.count(name) == 1
        docstring, *_, last = find_functions(SOURCE)[name].body
        assert isinstance(docstring.value.value, str)
        gone |= set(range(docstring.end_lineno + 1, last.end_lineno + 1))
    kept = [line for n, line in enumerate(SOURCE.splitlines(), 1) if n not in gone]
    handed_out = (hand_out / "randsac.py").read_text(encoding="utf-8")
    lines = [line for line in handed_out.splitlines() if "raise NotImplementedError" not in line]
    assert lines == kept  # signatures, docstrings, all
    functions = find_functions(handed_out)
    for name in names:
        assert ast.get_docstring(functions[name]) == ast.get_docstring(find_functions(SOURCE)[name])
        assert len(functions[name].body) == 2
        assert isinstance(functions[name].body[1], ast.Raise)
    assert handed_out.count("raise NotImplementedError") == 8


@pytest.mark.parametrize("number", EXERCISES)
def test_an_exercise_fails_alone_and_passes_alone(hand_out, number):
    # Right, though all others are empty.
    solved = take_out(SOURCE, EXERCISES.keys() - {number})
    for other, (section, _) in EXERCISES.items():
        raised = grade(hand_out, solved, other)
        if other == number:
            assert all_pass(raised), raised
            continue
        for error in raised.values():
            assert isinstance(error, NotImplementedError), (other, error)
            assert f"exercise {other} (Section {section})" in str(error)

    # Empty, though all others are right: each function is asked for.
    missing = take_out(SOURCE, [number])
    raised = grade(hand_out, missing, number)
    assert all(isinstance(error, NotImplementedError) for error in raised.values())
    for name in EXERCISES[number][1]:
        assert any(f"write {name}," in str(error) for error in raised.values())
    for other in EXERCISES.keys() - {number}:
        assert all_pass(grade(hand_out, missing, other))


def pytest_in(folder, *arguments):
    """-> exit code, the names of tests that passed, that failed, and the output."""
    words = [sys.executable, "-m", "pytest", "-q", "-rA", *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    result = subprocess.run(
        words, check=False, cwd=folder, env=env, timeout=120, capture_output=True, text=True
    )
    passed = set(re.findall(r"^PASSED \S+::(\w+)", result.stdout, re.MULTILINE))
    failed = set(re.findall(r"^FAILED \S+::(\w+)", result.stdout, re.MULTILINE))
    return result.returncode, passed, failed, result.stdout


def test_pytest_grades_the_hand_out(hand_out):
    _, tests = load_grader(hand_out / "tests/test_exercises.py")
    third = {test.__name__ for test in tests[3]}
    fourth = {test.__name__ for test in tests[4]}

    # A student has solved the third.
    empty = (hand_out / "randsac.py").read_text(encoding="utf-8")
    solved = take_out(SOURCE, EXERCISES.keys() - {3})
    try:
        (hand_out / "randsac.py").write_text(solved, encoding="utf-8")
        code, passed, failed, output = pytest_in(hand_out, "-m", "exercise3 or exercise4")
    finally:
        (hand_out / "randsac.py").write_text(empty, encoding="utf-8")
    assert code == 1
    assert passed == third, output
    assert failed == fourth, output
    assert "exercise 4 (Section 3.3): write serialize" in output
    assert "Unknown pytest.mark" not in output


def test_directory_in_use_is_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    for place in (tmp_path, tmp_path / "notes.txt"):
        monkeypatch.setattr(sys, "argv", ["assignment.py", "--out", str(place)])
        with pytest.raises(SystemExit) as ended:
            randsac.run_command(main)
        assert ended.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {place} is there and not an empty directory")
        assert "--out" in line
    assert [f.name for f in tmp_path.iterdir()] == ["notes.txt"]
    assert (tmp_path / "notes.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    main(["--out", str(tmp_path / "empty")])
    assert (tmp_path / "empty/randsac.py").exists()


@pytest.mark.parametrize("flags", [[], ["--out"], ["--out", "new", "--grade"], ["--ou", "new"]])
def test_wrong_flags_are_refused_in_a_line(tmp_path, monkeypatch, flags):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(randsac.UserError, match="--help"):
        main(flags)
    assert list(tmp_path.iterdir()) == []


# --- typical wrong answers: the exercise, the mistake, what stands in the right answer (-), what a
# --- student might write in its place (+), and the error (!) where no test of the grader says it

WRONG = """
1 rows and columns of the grid swapped
- x = x.permute(0, 2, 4, 3, 5, 1)
+ x = x.permute(0, 4, 2, 3, 5, 1)

1 rows and columns in a patch swapped
- x = x.permute(0, 2, 4, 3, 5, 1)
+ x = x.permute(0, 2, 4, 5, 3, 1)

1 channels first in a token
- x = x.permute(0, 2, 4, 3, 5, 1)
+ x = x.permute(0, 2, 4, 1, 3, 5)

1 reshape without permute
- x = x.permute(0, 2, 4, 3, 5, 1)
+ pass

1 wrong patch size not refused
- check(H % P == 0 and W % P == 0,
+ check(True,
! RuntimeError("shape

1 only the height checked
- check(H % P == 0 and W % P == 0,
+ check(H % P == 0,
! RuntimeError("shape

2 M is the number of squares along a side
- M = grid // math.isqrt(count)
+ M = math.isqrt(count)

2 M is the count
- M = grid // math.isqrt(count)
+ M = min(grid, count)

2 tokens of a square lie apart
- square = torch.arange(grid) // M
+ square = torch.arange(grid) % (grid // M)

2 strips in place of squares
- return ids.flatten()
+ return torch.arange(grid**2) // M**2

2 squares of a diagonal share an id
- ids = square[:, None] * (grid // M) + square
+ ids = square[:, None] + square

2 ids of a row of squares count M, not grid / M
- ids = square[:, None] * (grid // M) + square
+ ids = square[:, None] * M + square

2 ids beyond N
- ids = square[:, None] * (grid // M) + square
+ ids = square[:, None] * grid**2 + square

2 a grid of ids in place of a row
- return ids.flatten()
+ return ids

3 Euclidean distance
- torch.stack([along, across], -1) / deviation[:, None]
+ torch.stack([along, across], -1)

3 rotation the wrong way
- along = x * cos + y * sin
+ along = x * cos - y * sin
- across = y * cos - x * sin
+ across = y * cos + x * sin

3 no rotation
- torch.stack([along, across], -1)
+ torch.stack([x, y], -1)

3 one axis turned, the other not
- across = y * cos - x * sin
+ across = y

3 deviation not squared
- in_deviations = torch.stack([along, across], -1) / deviation[:, None]
+ in_deviations = torch.stack([along, across], -1) / deviation[:, None].sqrt()

3 deviation twice squared
- torch.stack([along, across], -1) / deviation[:, None]
+ torch.stack([along, across], -1) / deviation[:, None].square()

3 deviations along y and x
- torch.stack([along, across], -1) / deviation[:, None]
+ torch.stack([along, across], -1) / deviation[:, None].flip(-1)

3 points are y and x
- x, y = offset.unbind(-1)
+ y, x = offset.unbind(-1)

3 densest in place of nearest
- return in_deviations.square().sum(-1).argmin(-1)
+ surprise = in_deviations.square().sum(-1) + 2 * deviation[:, None].log().sum(-1)
+ return surprise.argmin(-1)

3 the larger of two distances, not both
- in_deviations.square().sum(-1)
+ in_deviations.square().amax(-1)

3 farthest
- .argmin(-1)
+ .argmax(-1)

3 nearest point of each Gaussian
- .argmin(-1)
+ .argmin(1)

4 partitions not finished: finest level only
- for ids in reversed(levels):
+ for ids in levels[:1]:

4 partitions not finished: fine before coarse
- for ids in reversed(levels):
+ for ids in levels:

4 partitions not finished: middle level left out
- for ids in reversed(levels):
+ for ids in levels[:0:-1][:1] + levels[:1]:

4 partitions not finished: sorted by place first
- ranks = dense(ranks * N + place.gather(1, ids))
+ ranks = dense(ranks + N * place.gather(1, ids))

4 finest level left out
- for ids in reversed(levels):
+ for ids in levels[:0:-1] or levels:

4 ranks not dense
- ranks = dense(ranks * N + place.gather(1, ids))
+ ranks = ranks * N + place.gather(1, ids)

4 every token its own rank
- place.gather(1, ids)
+ place

4 raster by id
- place = torch.full_like(ids, N).scatter_reduce(1, ids, token, "amin")
+ place = token

4 raster by last token
- place = torch.full_like(ids, N).scatter_reduce(1, ids, token, "amin")
+ place = torch.zeros_like(ids).scatter_reduce(1, ids, token, "amax")

4 one order for the whole batch
- place = permutations(B, N, device, generator)
+ place = permutations(1, N, device, generator).expand(B, N)

4 orders only rotated
- place = permutations(B, N, device, generator)
+ place = (torch.arange(N) + torch.randint(N, (B, 1), generator=generator)) % N

4 one coin for all partitions
- place = permutations(B, N, device, generator)
+ place = torch.arange(N) * (1 - 2 * torch.randint(2, (B, 1), generator=generator))

4 generator not used
- place = permutations(B, N, device, generator)
+ place = permutations(B, N, device)

4 always raster
- if order == "random":
+ if order == "rando":

4 always random
- if order == "random":
+ if order:

5 source: off by one
- source = i >= j
+ source = i >= j - 1

5 source: strict
- source = i >= j
+ source = i > j

5 source: transposed
- source = i >= j
+ source = i <= j

5 target: off by one
- target = (i >= j) & (j >= 1)
+ target = (i >= j) & (j > 1)

5 target: strict
- target = (i >= j) & (j >= 1)
+ target = (i > j) & (j >= 1)

5 target: transposed
- target = (i >= j) & (j >= 1)
+ target = (j >= i) & (i >= 1)

5 target: without j >= 1
- target = (i >= j) & (j >= 1)
+ target = i >= j

5 target: i >= 1 in place of j >= 1
- target = (i >= j) & (j >= 1)
+ target = (i >= j) & (i >= 1)

5 target: the given look at everything
- target = (i >= j) & (j >= 1)
+ target = (i >= j) & (j >= 1) | (i == 0)

5 memory: not strict
- memory = i > j
+ memory = i >= j

5 memory: off by one
- memory = i > j
+ memory = i > j + 1

5 memory: transposed
- memory = i > j
+ memory = i < j

5 memory: without rank 0
- memory = i > j
+ memory = (i > j) & (j >= 1)

5 memory: the given look at everything
- memory = i > j
+ memory = (i > j) | (i == 0)

5 target and memory swapped
- return source, target, memory
+ return source, memory, target

5 True where attention is forbidden
- return source, target, memory
+ return ~source, ~target, ~memory

5 numbers in place of bool
- return source, target, memory
+ return source.float(), target.float(), memory.float()

5 no batch
- i = ranks[..., :, None]
+ i = ranks[0, :, None]
- j = ranks[..., None, :]
+ j = ranks[0, None, :]

5 only a batch
- i = ranks[..., :, None]
+ i = ranks[:, :, None]
- j = ranks[..., None, :]
+ j = ranks[:, None, :]
! IndexError('too many indices

6 W transposed
- torch.einsum("lk,kbnd->lbnd", self.skip, H)
+ torch.einsum("kl,kbnd->lbnd", self.skip, H)
! RuntimeError('einsum()

6 last layer only
- return Z.unbind()
+ return [layers[-1]] * len(self.decoder)

6 last column of W only
- return Z.unbind()
+ return [w[-1] * layers[-1] for w in self.skip]

6 W through a softmax
- torch.einsum("lk,kbnd->lbnd", self.skip, H)
+ torch.einsum("lk,kbnd->lbnd", self.skip.softmax(-1), H)

6 W without gradient
- torch.einsum("lk,kbnd->lbnd", self.skip, H)
+ torch.einsum("lk,kbnd->lbnd", self.skip.detach(), H)

6 mean in place of sum
- return Z.unbind()
+ return (Z / len(layers)).unbind()

6 layers from last to first
- H = torch.stack(layers)
+ H = torch.stack(layers[::-1])

6 one memory for all decoder layers
- return Z.unbind()
+ return [Z.sum(0)]

6 a memory for each sample, not each layer
- return Z.unbind()
+ return Z.unbind(1)

6 --no-skip: first layer
- return [layers[-1]] * len(self.decoder)
+ return [layers[0]] * len(self.decoder)

6 --no-skip: the last layers
- return [layers[-1]] * len(self.decoder)
+ return layers[-len(self.decoder) :]

6 --no-skip: one memory
- return [layers[-1]] * len(self.decoder)
+ return [layers[-1]]

6 --no-skip forgotten
- if not self.config.skip:
+ if False:
! AttributeError("'RandSAC' object has no attribute 'skip'")

7 normalized over the batch
- mean = tokens.mean(-1, keepdim=True)
+ mean = tokens.mean(0, keepdim=True)
- variance = tokens.var(-1, keepdim=True)
+ variance = tokens.var(0, keepdim=True)

7 normalized over the image
- mean = tokens.mean(-1, keepdim=True)
+ mean = tokens.mean((-2, -1), keepdim=True)
- variance = tokens.var(-1, keepdim=True)
+ variance = tokens.var((-2, -1), keepdim=True)

7 mean not taken off
- return (tokens - mean)
+ return tokens

7 biased variance
- variance = tokens.var(-1, keepdim=True)
+ variance = tokens.var(-1, correction=0, keepdim=True)

7 divided by the variance
- / (variance + 1e-6).sqrt()
+ / (variance + 1e-6)

7 nothing added to the variance
- / (variance + 1e-6).sqrt()
+ / variance.sqrt()

7 1e-6 added to the deviation
- / (variance + 1e-6).sqrt()
+ / (variance.sqrt() + 1e-6)

7 mean over all tokens
- loss = (error * scored).sum(1) / scored.sum(1).clamp(min=1)
+ loss = (error * scored).mean(1)

7 rank 0 scored
- scored = (ranks >= 1).float()
+ scored = (ranks >= 0).float()

7 rank 1 not scored
- scored = (ranks >= 1).float()
+ scored = (ranks > 1).float()

7 sum over the batch
- return loss.mean()
+ return loss.sum()

7 sum over a sample's tokens
- loss = (error * scored).sum(1) / scored.sum(1).clamp(min=1)
+ loss = (error * scored).sum(1)

7 mean over all predicted tokens of the batch
- loss = (error * scored).sum(1) / scored.sum(1).clamp(min=1)
+ loss = (error * scored).sum() / scored.sum().clamp(min=1)

7 samples that predict nothing left out
- return loss.mean()
+ return loss[scored.sum(1) > 0].mean()

7 divided by nothing
- scored.sum(1).clamp(min=1)
+ scored.sum(1)

7 gradient divided by nothing
- loss = (error * scored).sum(1) / scored.sum(1).clamp(min=1)
+ mean = (error * scored).sum(1) / scored.sum(1)
+ loss = torch.where(scored.sum(1) > 0, mean, torch.zeros(len(ranks)))

7 one loss for each sample
- return loss.mean()
+ return loss

7 sum over a token's values
- (prediction - target).square().mean(-1)
+ (prediction - target).square().sum(-1)

7 absolute error
- (prediction - target).square().mean(-1)
+ (prediction - target).abs().mean(-1)
"""


@functools.cache
def all_but(number):
    """-> source of randsac.py in which this exercise alone is solved, the text of each of its
    functions."""
    source = take_out(SOURCE, EXERCISES.keys() - {number})
    functions = find_functions(source)
    names = EXERCISES[number][1]
    return source, [ast.get_source_segment(source, functions[name]) for name in names]


def make_wrong(number, edits):
    """-> source of randsac.py in which this exercise alone is solved, by a wrong answer."""
    source, texts = all_but(number)
    for right, wrong in edits:
        (text,) = [text for text in texts if right in text]
        assert text.count(right) == 1, "randsac.py has changed: the wrong answers have to follow it"
        (line,) = [line for line in text.splitlines() if right in line]
        indent = "\n" + " " * (len(line) - len(line.lstrip()))
        assert indent.join(wrong) != right
        changed = text.replace(right, indent.join(wrong))
        source = source.replace(text, changed)
        texts = [changed if other == text else other for other in texts]
    return source


@pytest.mark.parametrize("block", WRONG.strip().split("\n\n"), ids=lambda b: b.splitlines()[0])
def test_a_typical_wrong_answer_fails(hand_out, block):
    title, *lines = block.splitlines()
    edits = []
    crash = None
    for line in lines:
        if line.startswith("- "):
            edits.append((line[2:], []))
        elif line.startswith("+ "):
            edits[-1][1].append(line[2:])
        else:
            assert line.startswith("! ")
            crash = line[2:]
    number = int(title[0])
    raised = grade(hand_out, make_wrong(number, edits), number).values()
    errors = [error for error in raised if error]
    assert errors
    for error in errors:
        if type(error) not in (AssertionError, pytest.fail.Exception):
            assert crash, repr(error)
            assert crash in repr(error)
    assert not crash or any(crash in repr(error) for error in errors)


# --- other right answers than the project's own, as a student might write them

SOLUTIONS = {
    1: """
def patchify(images, patch_size):
    B, C, H, W = images.shape
    P = patch_size
    if H % P or W % P:
        raise UserError("P does not divide the image")
    tokens = []
    for y in range(0, H, P):
        for x in range(0, W, P):
            patch = images[:, :, y : y + P, x : x + P]
            tokens.append(patch.permute(0, 2, 3, 1).flatten(1))
    return torch.stack(tokens, 1)
""",
    2: """
def square_segments(grid, count):
    side = math.isqrt(count)
    M = grid // side
    ids = [i // grid // M + i % grid // M * side for i in range(grid * grid)]
    return count - 1 - torch.tensor(ids)
""",
    3: """
def nearest_gaussian(points, mean, deviation, angle):
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], -1)
    turn = turn.unflatten(-1, (2, 2))
    inverse = (turn @ torch.diag_embed(deviation**2) @ turn.mT).inverse()
    offset = points[:, :, None] - mean[:, None]
    return torch.einsum("bnki,bkij,bnkj->bnk", offset, inverse, offset).argmin(2)
""",
    4: """
def serialize(levels, order="random", generator=None):
    def visit(tokens, depth):
        if depth < 0:
            return [tokens]
        parts = {}
        for n in tokens:
            parts.setdefault(rows[depth][n], []).append(n)
        parts = list(parts.values())
        if order == "random":
            parts = [parts[i] for i in torch.randperm(len(parts), generator=generator)]
        segments = []
        for part in parts:
            segments += visit(part, depth - 1)
        return segments

    ranks = torch.empty(levels[0].shape, dtype=torch.long)
    for b in range(len(ranks)):
        rows = [level[b].tolist() for level in levels]
        for rank, segment in enumerate(visit(range(ranks.shape[1]), len(levels) - 1)):
            ranks[b, segment] = rank
    return ranks
""",
    5: """
def attention_masks(ranks):
    source = (ranks.unsqueeze(-1) - ranks.unsqueeze(-2)) >= 0
    return source, source & (ranks > 0).unsqueeze(-2), ~source.transpose(-1, -2)
""",
    6: """
def mix_skips(self, layers):
    if self.config.skip:
        return [sum(w * H for w, H in zip(row, layers)) for row in self.skip]
    return [layers[-1] for _ in self.decoder]


RandSAC.mix_skips = mix_skips
""",
    7: """
def normalize_patches(tokens):
    centred = tokens - tokens.mean(-1, keepdim=True)
    variance = centred.square().sum(-1, keepdim=True) / (tokens.shape[-1] - 1)
    return centred / torch.sqrt(variance + 1e-6)


def token_loss(prediction, target, ranks):
    losses = []
    for p, t, r in zip(prediction, target, ranks):
        if (r > 0).any():
            losses.append(F.mse_loss(p[r > 0], t[r > 0]))
        else:
            losses.append(0 * p.sum())
    return sum(losses) / len(losses)
""",
}


@pytest.mark.parametrize("number", SOLUTIONS)
def test_another_right_answer_passes(hand_out, number):
    empty = take_out(SOURCE, EXERCISES)
    raised = grade(
        hand_out, empty.replace("\nif __name__", SOLUTIONS[number] + "\nif __name__"), number
    )
    assert all_pass(raised), raised

"""The assignment: what the hand-out holds, that each exercise is graded alone, and that wrong answers fail."""
import ast
import importlib.util
import os
import re
import subprocess
import sys
import types

import pytest
import torch
from assignment import EXERCISES, ROOT, main, take_out
from conftest import command, fails_in_one_line

import randsac

SOURCE = (ROOT / "randsac.py").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def hand_out(tmp_path_factory):
    out = tmp_path_factory.mktemp("class") / "new" / "hand-out"
    result = command("tests/assignment.py", "--out", out, cwd=out.parent.parent)
    assert result.returncode == 0, result.stderr
    assert f"cd {out}" in result.stdout and "pytest -m exercise1" in result.stdout  # what to do next
    return out


def load_grader(path):
    """-> the grader as a module, its tests as {number of the exercise: [function]}."""
    spec = importlib.util.spec_from_file_location("grader", path)
    grader = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(grader)
    tests = {number: [] for number in EXERCISES}
    for name, test in vars(grader).items():
        if name.startswith("test_"):
            mark, = test.pytestmark  # every test grades exactly one exercise
            tests[int(mark.name.removeprefix("exercise"))].append(test)
    return grader, tests


def grade(hand_out, source, number):
    """Grades one exercise of this randsac.py -> for each test, what it raised, or None. (A process takes seconds.)"""
    solution = types.ModuleType("solution")
    exec(compile(source, "solution.py", "exec"), vars(solution))
    grader, tests = load_grader(hand_out / "tests/test_exercises.py")
    grader.randsac = solution
    raised = []
    for test in tests[number]:
        try:
            raised.append(test())
        except (Exception, pytest.fail.Exception) as error:
            raised.append(error)
    return raised


def test_hand_out_is_the_project_without_seven_exercises(hand_out):
    files = {f.relative_to(hand_out).as_posix() for f in hand_out.rglob("*") if f.is_file()}
    pictures = {f.relative_to(ROOT).as_posix() for f in (ROOT / "assets").rglob("*") if f.is_file()}
    assert files - pictures == {"README.md", "LICENSE", "CITATION.cff", "requirements.txt", "randsac.py", "probe.py",
                                "visualize.py", "tests/conftest.py", "tests/test_exercises.py"} and files > pictures
    for name in files - {"randsac.py"}:
        assert (hand_out / name).read_bytes() == (ROOT / name).read_bytes()


def test_only_the_bodies_of_the_exercises_are_gone(hand_out):
    names, bodies = [name for _, names in EXERCISES.values() for name in names], {}
    for node in ast.walk(ast.parse(SOURCE)):
        if isinstance(node, ast.FunctionDef) and node.name in names:
            assert node.name not in bodies and ast.get_docstring(node)
            bodies[node.name] = range(node.body[1].lineno, node.body[-1].end_lineno + 1)
    assert sorted(bodies) == sorted(names)
    kept = [line for n, line in enumerate(SOURCE.splitlines(), 1) if not any(n in body for body in bodies.values())]
    lines = (hand_out / "randsac.py").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if "raise NotImplementedError" not in line] == kept  # signatures, docstrings, all
    for node in ast.walk(ast.parse("\n".join(lines))):
        if isinstance(node, ast.FunctionDef) and node.name in names:
            assert len(node.body) == 2 and isinstance(node.body[1], ast.Raise)


@pytest.mark.parametrize("number", EXERCISES)
def test_an_exercise_fails_alone_and_passes_alone(hand_out, number):
    section, names = EXERCISES[number]
    solved = take_out(SOURCE, EXERCISES.keys() - {number})
    for other in EXERCISES:
        raised = grade(hand_out, solved, other)
        if other == number:
            assert raised and not any(raised), raised  # right, though all others are empty
        else:
            for error in raised:
                assert isinstance(error, NotImplementedError), (other, error)
                assert f"exercise {other} (Section {EXERCISES[other][0]})" in str(error)
    missing = take_out(SOURCE, [number])
    raised = grade(hand_out, missing, number)
    assert all(isinstance(error, NotImplementedError) for error in raised)
    assert {name for name in names if any(f"write {name}," in str(error) for error in raised)} == set(names)
    assert not any(error for other in EXERCISES if other != number for error in grade(hand_out, missing, other))


def pytest_in(folder, *arguments):
    """-> exit code, the names of tests that passed, that failed, and the output."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    result = subprocess.run([sys.executable, "-m", "pytest", "-q", "-rA", *arguments], cwd=folder, env=env, timeout=120,
                            capture_output=True, text=True)
    passed, failed = (set(re.findall(rf"^{word} \S+::(\w+)", result.stdout, re.M)) for word in ("PASSED", "FAILED"))
    return result.returncode, passed, failed, result.stdout


def test_pytest_grades_the_hand_out(hand_out):
    _, tests = load_grader(hand_out / "tests/test_exercises.py")
    tests = {number: {test.__name__ for test in tests[number]} for number in tests}
    code, passed, failed, output = pytest_in(hand_out, "-m", "exercise3")
    assert code == 1 and not passed and failed == tests[3], output
    assert "exercise 3 (Section 3.2): write nearest_gaussian" in output and "Unknown pytest.mark" not in output

    student = (hand_out / "randsac.py").read_text(encoding="utf-8")
    try:
        (hand_out / "randsac.py").write_text(take_out(SOURCE, EXERCISES.keys() - {3}), encoding="utf-8")
        code, passed, failed, output = pytest_in(hand_out)
    finally:
        (hand_out / "randsac.py").write_text(student, encoding="utf-8")
    assert code == 1 and passed == tests[3] and failed == set().union(*tests.values()) - tests[3], output


def test_directory_in_use_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    fails_in_one_line(command("tests/assignment.py", "--out", tmp_path, cwd=tmp_path), str(tmp_path), "empty", "--out")
    for place in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(randsac.UserError):
            main(["--out", str(place)])
    assert [f.name for f in tmp_path.iterdir()] == ["notes.txt"] and (tmp_path / "notes.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    main(["--out", str(tmp_path / "empty")])
    assert (tmp_path / "empty/randsac.py").exists()


PERMUTE = "x.permute(0, 2, 4, 3, 5, 1).reshape(B, -1, P * P * C)"
FIRST = 'torch.full_like(ids, N).scatter_reduce(1, ids, torch.arange(N, device=device).expand(B, N), "amin")'
DRAW = "place = permutations(B, N, device, generator)"
MASKS = "return i >= j, (i >= j) & (j >= 1), i > j"
MIX = 'torch.einsum("lk,kbnd->lbnd", self.skip, torch.stack(layers)).unbind()'
NORMALIZE = "return (tokens - tokens.mean(-1, keepdim=True)) / (tokens.var(-1, keepdim=True) + 1e-6).sqrt()"
LOSS = "((error * scored).sum(1) / scored.sum(1).clamp(min=1)).mean()"
WRONG = [  # exercise, the mistake, a part of the right answer, what a student might write in its place
    (1, "rows and columns of the grid swapped", PERMUTE, PERMUTE.replace("2, 4,", "4, 2,")),
    (1, "rows and columns in a patch swapped", PERMUTE, PERMUTE.replace("3, 5, 1", "5, 3, 1")),
    (1, "channels first in a token", PERMUTE, PERMUTE.replace("3, 5, 1", "1, 3, 5")),
    (1, "reshape without permute", PERMUTE, "x.reshape(B, -1, P * P * C)"),
    (1, "wrong patch size not refused", "check(H % P == 0 and W % P == 0,", "check(True,"),
    (1, "only the height checked", "check(H % P == 0 and W % P == 0,", "check(H % P == 0,"),
    (2, "M is the number of squares along a side", "M = grid // math.isqrt(count)", "M = math.isqrt(count)"),
    (2, "M is the count", "M = grid // math.isqrt(count)", "M = min(grid, count)"),
    (2, "tokens of a square lie apart", "torch.arange(grid) // M", "torch.arange(grid) % (grid // M)"),
    (2, "strips in place of squares", "(index[:, None] * (grid // M) + index).flatten()",
     "torch.arange(grid * grid) // (M * M)"),
    (2, "squares of a diagonal share an id", "index[:, None] * (grid // M) + index", "index[:, None] + index"),
    (2, "ids of a row of squares count M, not grid / M", "index[:, None] * (grid // M)", "index[:, None] * M"),
    (2, "ids beyond N", "index[:, None] * (grid // M)", "index[:, None] * grid ** 2"),
    (3, "Euclidean distance", "(turned / deviation[:, None])", "(turned)"),
    (3, "rotation the wrong way", "[x * cos + y * sin, y * cos - x * sin]", "[x * cos - y * sin, y * cos + x * sin]"),
    (3, "no rotation", "[x * cos + y * sin, y * cos - x * sin]", "[x, y]"),
    (3, "deviation not squared", "(turned / deviation[:, None]).square()", "(turned.square() / deviation[:, None])"),
    (3, "deviation twice squared", "(turned / deviation[:, None])", "(turned / deviation[:, None].square())"),
    (3, "deviations along y and x", "(turned / deviation[:, None])", "(turned / deviation[:, None].flip(-1))"),
    (3, "points are y and x", "x, y = (points", "y, x = (points"),
    (3, "densest in place of nearest", ".square().sum(-1).argmin(-1)",
     ".square().sum(-1).add(2 * deviation[:, None].log().sum(-1)).argmin(-1)"),
    (3, "farthest", ".argmin(-1)", ".argmax(-1)"),
    (3, "nearest point of each Gaussian", ".argmin(-1)", ".argmin(1)"),
    (4, "partitions not finished: finest level only", "reversed(levels)", "levels[:1]"),
    (4, "partitions not finished: fine before coarse", "reversed(levels)", "levels"),
    (4, "partitions not finished: middle level left out", "reversed(levels)", "levels[:0:-1][:1] + levels[:1]"),
    (4, "finest level left out", "reversed(levels)", "levels[:0:-1] or levels"),
    (4, "ranks not dense", "dense(ranks * N + place.gather(1, ids))", "ranks * N + place.gather(1, ids)"),
    (4, "every token its own rank", "place.gather(1, ids)", "place"),
    (4, "raster by id", FIRST, "torch.arange(N).expand(B, N)"),
    (4, "raster by last token", FIRST, FIRST.replace("full_like(ids, N)", "zeros_like(ids)").replace("amin", "amax")),
    (4, "one order for the whole batch", DRAW, "place = permutations(1, N, device, generator).expand(B, N)"),
    (4, "orders only rotated", DRAW, "place = (torch.arange(N) + torch.randint(N, (B, 1), generator=generator)) % N"),
    (4, "one coin for all partitions", DRAW,
     "place = torch.arange(N) * (1 - 2 * torch.randint(2, (B, 1), generator=generator))"),
    (4, "generator not used", DRAW, "place = permutations(B, N, device)"),
    (4, "always raster", 'if order == "random":', 'if order == "rando":'),
    (4, "always random", 'if order == "random":', 'if order:'),
    (5, "source: off by one", MASKS, "return i >= j - 1, (i >= j) & (j >= 1), i > j"),
    (5, "source: strict", MASKS, "return i > j, (i >= j) & (j >= 1), i > j"),
    (5, "source: transposed", MASKS, "return i <= j, (i >= j) & (j >= 1), i > j"),
    (5, "target: off by one", MASKS, "return i >= j, (i >= j) & (j > 1), i > j"),
    (5, "target: strict", MASKS, "return i >= j, (i > j) & (j >= 1), i > j"),
    (5, "target: transposed", MASKS, "return i >= j, (j >= i) & (i >= 1), i > j"),
    (5, "target: without j >= 1", MASKS, "return i >= j, i >= j, i > j"),
    (5, "target: i >= 1 in place of j >= 1", MASKS, "return i >= j, (i >= j) & (i >= 1), i > j"),
    (5, "memory: not strict", MASKS, "return i >= j, (i >= j) & (j >= 1), i >= j"),
    (5, "memory: off by one", MASKS, "return i >= j, (i >= j) & (j >= 1), i > j + 1"),
    (5, "memory: transposed", MASKS, "return i >= j, (i >= j) & (j >= 1), i < j"),
    (5, "memory: without rank 0", MASKS, "return i >= j, (i >= j) & (j >= 1), (i > j) & (j >= 1)"),
    (5, "True where attention is forbidden", MASKS, "return i < j, (i < j) | (j < 1), i <= j"),
    (5, "numbers in place of bool", MASKS, "return [m.float() for m in (i >= j, (i >= j) & (j >= 1), i > j)]"),
    (5, "no batch", "i, j = ranks[..., :, None], ranks[..., None, :]", "i, j = ranks[0, :, None], ranks[0, None, :]"),
    (6, "W transposed", MIX, MIX.replace("lk,", "kl,")),
    (6, "last layer only", MIX, "layers[-1:] * len(self.decoder)"),
    (6, "last column of W only", MIX, "[w[-1] * layers[-1] for w in self.skip]"),
    (6, "W through a softmax", MIX, MIX.replace("self.skip", "self.skip.softmax(-1)")),
    (6, "W without gradient", MIX, MIX.replace("self.skip", "self.skip.detach()")),
    (6, "mean in place of sum", MIX, "(" + MIX.removesuffix(".unbind()") + " / len(layers)).unbind()"),
    (6, "layers from last to first", MIX, MIX.replace("layers)", "layers[::-1])")),
    (6, "one memory for all decoder layers", MIX, "[torch.einsum('lk,kbnd->bnd', self.skip, torch.stack(layers))]"),
    (6, "--no-skip: first layer", "return layers[-1:] *", "return layers[:1] *"),
    (6, "--no-skip: the last layers", "return layers[-1:] * len(self.decoder)", "return layers[-len(self.decoder):]"),
    (6, "--no-skip forgotten", "if not self.config.skip:", "if False:"),
    (7, "normalized over the batch", NORMALIZE, NORMALIZE.replace("(-1,", "(0,")),
    (7, "normalized over the image", NORMALIZE, NORMALIZE.replace("(-1,", "((-2, -1),")),
    (7, "mean not taken off", NORMALIZE, NORMALIZE.replace("tokens - tokens.mean(-1, keepdim=True)", "tokens")),
    (7, "biased variance", NORMALIZE, NORMALIZE.replace("var(-1,", "var(-1, correction=0,")),
    (7, "divided by the variance", NORMALIZE, NORMALIZE.replace(".sqrt()", "")),
    (7, "nothing added to the variance", NORMALIZE, NORMALIZE.replace(" + 1e-6", "")),
    (7, "1e-6 added to the deviation", NORMALIZE, NORMALIZE.replace(" + 1e-6).sqrt()", ").sqrt().add(1e-6)")),
    (7, "mean over all tokens", LOSS, "(error * scored).mean()"),
    (7, "rank 0 scored", "(ranks >= 1).float()", "(ranks >= 0).float()"),
    (7, "rank 1 not scored", "(ranks >= 1).float()", "(ranks > 1).float()"),
    (7, "sum over the batch", LOSS, LOSS.replace(".mean()", ".sum()")),
    (7, "sum over a sample's tokens", LOSS, "(error * scored).sum(1).mean()"),
    (7, "mean over all predicted tokens of the batch", LOSS, "(error * scored).sum() / scored.sum().clamp(min=1)"),
    (7, "samples that predict nothing left out", LOSS, "error[ranks >= 1].mean()"),
    (7, "divided by nothing", LOSS, LOSS.replace(".clamp(min=1)", "")),
    (7, "gradient divided by nothing", LOSS,
     "torch.where(scored.sum(1) > 0, (error * scored).sum(1) / scored.sum(1), torch.zeros(len(ranks))).mean()"),
    (7, "one loss for each sample", LOSS, LOSS.removesuffix(".mean()")),
    (7, "sum over a token's values", ".square().mean(-1)", ".square().sum(-1)"),
    (7, "absolute error", ".square().mean(-1)", ".abs().mean(-1)")]


@pytest.mark.parametrize("number, mistake, right, wrong", WRONG, ids=[f"{w[0]}: {w[1]}" for w in WRONG])
def test_a_typical_wrong_answer_fails(hand_out, number, mistake, right, wrong):
    assert right != wrong and SOURCE.count(right) == 1, "randsac.py has changed: this wrong answer has to follow it"
    source = take_out(SOURCE.replace(right, wrong), EXERCISES.keys() - {number})
    raised = [error for error in grade(hand_out, source, number) if error]
    assert raised and not any(isinstance(error, (NotImplementedError, NameError)) for error in raised), raised


SOLUTIONS = {  # other right answers than the project's own, as a student might write them
    1: """
def patchify(images, patch_size):
    (B, C, H, W), P = images.shape, patch_size
    if H % P or W % P:
        raise UserError("P does not divide the image")
    corners = [(y, x) for y in range(0, H, P) for x in range(0, W, P)]
    return torch.stack([images[:, :, y:y + P, x:x + P].permute(0, 2, 3, 1).flatten(1) for y, x in corners], 1)""",
    2: """
def square_segments(grid, count):
    side = math.isqrt(count)
    M = grid // side
    return torch.tensor([count - 1 - (i // grid // M + i % grid // M * side) for i in range(grid * grid)])""",
    3: """
def nearest_gaussian(points, mean, deviation, angle):
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], -1).unflatten(-1, (2, 2))
    inverse = (turn @ torch.diag_embed(deviation ** 2) @ turn.mT).inverse()
    offset = points[:, :, None] - mean[:, None]
    return torch.einsum("bnki,bkij,bnkj->bnk", offset, inverse, offset).argmin(2)""",
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
        return [segment for part in parts for segment in visit(part, depth - 1)]

    ranks = torch.empty(levels[0].shape, dtype=torch.long)
    for b in range(len(ranks)):
        rows = [level[b].tolist() for level in levels]
        for rank, segment in enumerate(visit(range(ranks.shape[1]), len(levels) - 1)):
            ranks[b, segment] = rank
    return ranks""",
    5: """
def attention_masks(ranks):
    source = (ranks.unsqueeze(-1) - ranks.unsqueeze(-2)) >= 0
    return source, source & (ranks > 0).unsqueeze(-2), ~source.transpose(-1, -2)""",
    6: """
def mix_skips(self, layers):
    if self.config.skip:
        return [sum(w * H for w, H in zip(row, layers)) for row in self.skip]
    return [layers[-1] for _ in self.decoder]
RandSAC.mix_skips = mix_skips""",
    7: """
def normalize_patches(tokens):
    centred = tokens - tokens.mean(-1, keepdim=True)
    return centred / torch.sqrt(centred.square().sum(-1, keepdim=True) / (tokens.shape[-1] - 1) + 1e-6)

def token_loss(prediction, target, ranks):
    losses = []
    for p, t, r in zip(prediction, target, ranks):
        losses.append(F.mse_loss(p[r > 0], t[r > 0]) if (r > 0).any() else 0 * p.sum())
    return sum(losses) / len(losses)"""}


@pytest.mark.parametrize("number", SOLUTIONS)
def test_another_right_answer_passes(hand_out, number):
    source = take_out(SOURCE, EXERCISES).replace("\nif __name__", SOLUTIONS[number] + "\n\nif __name__")
    raised = grade(hand_out, source, number)
    assert raised and not any(raised), raised

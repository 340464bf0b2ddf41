"""The assignment: what the hand-out holds, that each exercise is graded alone, and that
wrong answers fail and other right ones pass."""

import ast
import re
import sys
import textwrap

import assignment
import pytest
import test_exercises
from assignment import EXERCISES, ROOT, find_functions, take_out
from conftest import refusal

import randsac

SOURCE = (ROOT / "randsac.py").read_text(encoding="utf-8")
NAMES = [name for _, names in EXERCISES.values() for name in names]


def texts_of(source):
    """-> the functions of the exercises, {name: text}."""
    functions = find_functions(source)
    texts = {name: ast.get_source_segment(source, functions[name], padded=True) for name in NAMES}
    return {name: textwrap.dedent(text) for name, text in texts.items()}


RIGHT = texts_of(SOURCE)
EMPTY = texts_of(take_out(SOURCE))


@pytest.fixture(scope="module")
def hand_out(tmp_path_factory):
    out = tmp_path_factory.mktemp("class") / "new" / "hand-out"
    assignment.main(["--out", str(out)])
    return out


def grade(number, texts):
    """Grades one exercise, with functions of these texts {name: text} in place of randsac's -> what
    each of its tests raised, or None."""
    tests = []
    for name, test in vars(test_exercises).items():
        if name.startswith("test_"):
            (mark,) = test.pytestmark  # every test grades exactly one exercise
            if mark.name == f"exercise{number}":
                tests.append(test)
    assert tests

    raised = []
    with pytest.MonkeyPatch.context() as patch:
        for name, text in texts.items():
            namespace = dict(vars(randsac))
            exec(text, namespace)  # noqa: S102 (ours)
            home = randsac if hasattr(randsac, name) else randsac.RandSAC
            patch.setattr(home, name, namespace[name])
        for test in tests:
            try:
                test()
                raised.append(None)
            except (Exception, pytest.fail.Exception) as error:  # noqa: BLE001 (a student's)
                raised.append(error)
    return raised


# --- the hand-out


def test_hand_out_is_the_project_without_nine_bodies(hand_out):
    files = {f.relative_to(hand_out).as_posix() for f in hand_out.rglob("*") if f.is_file()}
    own = {"randsac.py", "ASSIGNMENT.md", "pytest.ini"}
    assert files > own | {"requirements.txt", "assets/nano-cifar10/checkpoint.pt"}
    assert files.isdisjoint({"README.md", "assets/explore.html"})  # they hold answers
    for name in files - own:
        assert (hand_out / name).read_bytes() == (ROOT / name).read_bytes()

    # In place of each body stands an error. All else is there, signatures and docstrings too.
    assert len(NAMES) == 9
    tree = ast.parse((hand_out / "randsac.py").read_text(encoding="utf-8"))
    right = find_functions(SOURCE)
    for node in ast.walk(tree):
        if getattr(node, "name", None) in NAMES:
            assert [type(part) for part in node.body] == [ast.Expr, ast.Raise]
            node.body[1:] = right[node.name].body[1:]
    assert ast.dump(tree) == ast.dump(ast.parse(SOURCE))


def test_the_sheet_names_what_is_there(hand_out):
    sheet = (hand_out / "ASSIGNMENT.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\]\((.*?)\)", sheet)) == {"https://arxiv.org/abs/2203.12054"}
    for name in set(re.findall(r"assets/[\w/.-]+|\w+\.py", sheet)) - {"leak.py"}:
        assert (hand_out / name).exists(), name
    points = 0
    parts = sheet.split("\n## Exercise ")[1:]
    for part, number in zip(parts, [*EXERCISES, 9], strict=True):
        section, names = EXERCISES.get(number, ("4.1", []))  # the ninth is open
        heading = rf"{number}: .*\(Section {section}\), \d+ minutes, (\d+) points\n"
        points += int(re.match(heading, part)[1])
        assert (f"pytest -m exercise{number}\n" in part) == (number in EXERCISES)
        for name in names:
            assert EMPTY[name].splitlines()[0] in part
    assert points == 100


def test_pytest_grades_the_hand_out(hand_out, monkeypatch, capsys):
    # A student has solved the seventh exercise.
    program = hand_out / "randsac.py"
    empty = program.read_text(encoding="utf-8")
    solved = empty.replace(EMPTY["normalize_patches"], RIGHT["normalize_patches"])
    program.write_text(solved, encoding="utf-8")

    # In this process, as an import of torch takes seconds, but not with this project's modules.
    monkeypatch.chdir(hand_out)
    for name in ("randsac", "test_exercises"):
        monkeypatch.delitem(sys.modules, name)
    code = pytest.main(["-rA", "-m", "exercise7 or exercise8"])
    program.write_text(empty, encoding="utf-8")
    output = capsys.readouterr().out
    assert code == pytest.ExitCode.TESTS_FAILED
    passed = ["test_each_patch_is_normalized_by_its_own_mean_and_variance"]
    assert re.findall(r"^PASSED \S+::(\w+)", output, re.MULTILINE) == passed
    assert len(re.findall(r"^FAILED", output, re.MULTILINE)) == 4
    assert "exercise 8 (Section 5): write token_loss" in output
    pytest.main(["--markers"])
    marks = re.findall(r"^@pytest.mark.exercise(\d):", capsys.readouterr().out, re.MULTILINE)
    assert marks == list("12345678")


def test_a_directory_in_use_and_wrong_flags_are_refused(tmp_path):
    notes = tmp_path / "notes.txt"
    notes.write_text("mine")
    for place in (tmp_path, notes):
        assert "choose another --out" in refusal(assignment.main, ["--out", str(place)])
    for flags in ([], ["--out"], ["--out", str(tmp_path / "new"), "--grade"]):
        assert "--help" in refusal(assignment.main, flags)
    assert [*tmp_path.iterdir()] == [notes]
    assert notes.read_text() == "mine"
    (tmp_path / "empty").mkdir()
    assignment.main(["--out", str(tmp_path / "empty")])
    assert (tmp_path / "empty/randsac.py").exists()


# --- grading


@pytest.mark.parametrize("number", EXERCISES)
def test_an_exercise_fails_alone_and_passes_alone(number):
    section, names = EXERCISES[number]
    others = {name: text for name, text in EMPTY.items() if name not in names}
    assert not any(grade(number, others))  # all others are empty
    errors = grade(number, {name: EMPTY[name] for name in names})
    for error in errors:
        assert isinstance(error, NotImplementedError)
    for name in names:
        words = f"exercise {number} (Section {section}): write {name}, "
        assert any(words in str(error) for error in errors)


# Typical wrong answers: an exercise and code of the right answer, then what a student might write
# in its place, the mistake (#), and what an error has to say (!), for instance where Python stops.
WRONG = """
1 x = x.permute(0, 2, 4, 3, 5, 1)
  x = x.permute(0, 4, 2, 3, 5, 1)  # rows and columns of the grid swapped
  x = x.permute(0, 2, 4, 5, 3, 1)  # rows and columns in a patch swapped
  x = x.permute(0, 2, 4, 1, 3, 5)  # channels first in a token
  pass  # reshape without permute
1 check(H % P == 0 and W % P == 0,
  check(True,  # wrong patch size not refused ! RuntimeError("shape
  check(H % P == 0,  # only the height checked ! RuntimeError("shape
1 x = x.permute(0, 5, 1, 3, 2, 4)
  x = x.permute(0, 5, 2, 3, 1, 4)  # rows and columns of the grid swapped
  x = x.permute(0, 5, 1, 4, 2, 3)  # rows and columns in a patch swapped
  x = x.permute(0, 1, 3, 2, 4, 5)  # channels last
  pass  # reshape without permute
2 M = grid // math.isqrt(count)
  M = math.isqrt(count)  # M is the number of squares along a side
2 square = torch.arange(grid) // M
  square = torch.arange(grid) % (grid // M)  # tokens of a square lie apart
2 return ids.flatten()
  return torch.arange(grid**2) // M**2  # strips in place of squares
  return ids  # a grid of ids in place of a row
2 ids = square[:, None] * (grid // M) + square
  ids = square[:, None] + square  # squares of a diagonal share an id
  ids = square[:, None] * M + square  # ids of a row of squares count M, not grid / M
  ids = square[:, None] * grid**2 + square  # ids beyond N
3 / deviation[:, None]
  / 1  # Euclidean distance
  / deviation[:, None].square()  # deviation twice squared
  / deviation[:, None].flip(-1)  # deviations along y and x
3 across = y * cos - x * sin
  along = x * cos - y * sin; across = y * cos + x * sin  # rotation the wrong way
3 torch.stack([along, across], -1)
  torch.stack([x, y], -1)  # no rotation
3 x, y = offset.unbind(-1)
  y, x = offset.unbind(-1)  # points are y and x
3 in_deviations.square().sum(-1)
  (in_deviations.square() + 2 * deviation[:, None].log()).sum(-1)  # densest in place of nearest
  in_deviations.square().amax(-1)  # the larger of two distances, not both
3 .argmin(-1)
  .argmax(-1)  # farthest
  .argmin(1)  # nearest point of each Gaussian
4 for ids in reversed(levels):
  for ids in levels[:1]:  # partitions not finished: finest level only
  for ids in levels:  # partitions not finished: fine before coarse
  for ids in levels[:0:-1][:1] + levels[:1]:  # partitions not finished: middle level left out
  for ids in levels[:0:-1] or levels:  # finest level left out
4 ranks = dense(ranks * N + place.gather(1, ids))
  ranks = dense(ranks + N * place.gather(1, ids))  # partitions not finished: sorted by place first
  ranks = ranks * N + place.gather(1, ids)  # ranks not dense
4 place.gather(1, ids)
  place  # every token its own rank
4 place = torch.full_like(ids, N).scatter_reduce(1, ids, token, "amin")
  place = token  # raster by id
  place = torch.zeros_like(ids).scatter_reduce(1, ids, token, "amax")  # raster by last token
4 place = permutations(B, N, device, generator)
  place = permutations(1, N).expand(B, N)  # one order for all ! each sample draws its own order
  place = (torch.arange(N) + torch.randint(N, (B, 1), generator=generator)) % N  # rotations only
  place = torch.arange(N) * (2 * torch.randint(2, (B, 1), generator=generator) - 1)  # one coin
  place = permutations(B, N, device)  # generator not used
4 if order == "random":
  if order == "rando":  # always raster
  if order:  # always random
5 source = i >= j
  source = i > j  # strict
  source = i <= j  # transposed
5 target = (i >= j) & (j >= 1)
  target = (i > j) & (j >= 1)  # strict
  target = (j >= i) & (i >= 1)  # transposed
  target = i >= j  # without j >= 1
  target = (i >= j) & (i >= 1)  # i >= 1 in place of j >= 1
5 memory = i > j
  memory = i >= j  # not strict
  memory = i < j  # transposed
  memory = (i > j) & (j >= 1)  # without rank 0
5 return source, target, memory
  return source, memory, target  # target and memory swapped
  return ~source, ~target, ~memory  # True where attention is forbidden
  return source.float(), target.float(), memory.float()  # numbers in place of bool
5 j = ranks[..., None, :]
  i = ranks[0, :, None]; j = ranks[0, None, :]  # no batch
  i = ranks[:, :, None]; j = ranks[:, None, :]  # only a batch ! IndexError('too many indices
6 torch.einsum("lk,kbnd->lbnd", self.skip, H)
  torch.einsum("kl,kbnd->lbnd", self.skip, H)  # W transposed ! RuntimeError('einsum()
  torch.einsum("lk,kbnd->lbnd", self.skip.softmax(-1), H)  # W through a softmax
  torch.einsum("lk,kbnd->lbnd", self.skip.detach(), H)  # W without gradient
6 return Z.unbind()
  return [layers[-1]] * len(self.decoder)  # last layer only
  return (Z / len(layers)).unbind()  # mean in place of sum
  return [Z.sum(0)]  # one memory for all decoder layers
  return Z.unbind(1)  # a memory for each sample, not each layer
6 H = torch.stack(layers)
  H = torch.stack(layers[::-1])  # layers from last to first
6 return [layers[-1]] * len(self.decoder)
  return [layers[0]] * len(self.decoder)  # --no-skip: first layer
  return layers[-len(self.decoder) :]  # --no-skip: the last layers
  return [layers[-1]]  # --no-skip: one memory
6 if not self.config.skip:
  if False:  # --no-skip forgotten ! AttributeError("'RandSAC' object has no attribute 'skip'")
7 variance = tokens.var(-1, keepdim=True)
  mean = tokens.mean(0, keepdim=True); variance = tokens.var(0, keepdim=True)  # over the batch
  variance = tokens.var(-1, correction=0, keepdim=True)  # biased variance
7 return (tokens - mean)
  return tokens  # mean not taken off
7 / (variance + 1e-6).sqrt()
  / (variance + 1e-6)  # divided by the variance
  / variance.sqrt()  # nothing added to the variance
  / (variance.sqrt() + 1e-6)  # 1e-6 added to the deviation
8 loss = (error * scored).sum(1) / scored.sum(1).clamp(min=1)
  loss = (error * scored).mean(1)  # mean over all tokens
  loss = (error * scored).sum(1)  # sum over a sample's tokens
  loss = (error * scored).sum() / scored.sum().clamp(min=1)  # one mean over tokens and samples
  n = scored.sum(1); loss = torch.where(n > 0, (error * scored).sum(1) / n, 0.0)  # gradient: 0 / 0
8 scored = (ranks >= 1).float()
  scored = (ranks >= 0).float()  # rank 0 scored
  scored = (ranks > 1).float()  # rank 1 not scored
8 return loss.mean()
  return loss.sum()  # sum over the batch
  return loss[scored.sum(1) > 0].mean()  # samples that predict nothing left out
  return loss  # one loss for each sample
8 scored.sum(1).clamp(min=1)
  scored.sum(1)  # divided by nothing
8 (prediction - target).square().mean(-1)
  (prediction - target).square().sum(-1)  # sum over a token's values
  (prediction - target).abs().mean(-1)  # absolute error
"""


def wrong_answers():
    """-> (number of the exercise, right code, wrong code, mistake, what an error says)."""
    found = []
    for line in WRONG.strip().splitlines():
        if not line.startswith("  "):
            number, right = line.split(" ", 1)
            continue
        wrong, words = line.strip().split("  # ")
        mistake, _, error = words.partition(" ! ")
        values = (int(number), right, wrong, error)
        found.append(pytest.param(*values, id=f"{number} {mistake}"))
    return found


@pytest.mark.parametrize("number, right, wrong, said", wrong_answers())
def test_a_typical_wrong_answer_fails(number, right, wrong, said):
    (name,) = [name for name in EXERCISES[number][1] if right in RIGHT[name]]
    assert RIGHT[name].count(right) == 1, "randsac.py has changed: the wrong answers have to follow"
    errors = [error for error in grade(number, {name: RIGHT[name].replace(right, wrong)}) if error]
    assert errors
    assert any(said in repr(error) for error in errors)
    for error in errors:
        foreseen = isinstance(error, (AssertionError, pytest.fail.Exception))
        assert foreseen or said, repr(error)


# Other right answers than the project's own, as a student might write them.
SOLUTIONS = {
    1: """
def patchify(images, patch_size):
    if images.shape[2] % patch_size or images.shape[3] % patch_size:
        raise UserError("P does not divide the image")
    x = F.unfold(images, patch_size, stride=patch_size)
    return x.unflatten(1, (-1, patch_size**2)).permute(0, 3, 2, 1).flatten(2)

def unpatchify(tokens, patch_size):
    x = tokens.unflatten(2, (patch_size**2, -1)).permute(0, 3, 2, 1).flatten(1, 2)
    side = patch_size * math.isqrt(tokens.shape[1])
    return F.fold(x, (side, side), patch_size, stride=patch_size)
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
    ranks = torch.empty(levels[0].shape, dtype=torch.long)
    for b in range(len(ranks)):
        places = []
        for level in reversed(levels):
            ids = level[b].tolist()
            names = list(dict.fromkeys(ids))  # by their first tokens
            if order == "random":
                names = [names[i] for i in torch.randperm(len(names), generator=generator)]
            places.append([names.index(name) for name in ids])
        keys = list(zip(*places))
        segments = sorted(set(keys))
        ranks[b] = torch.tensor([segments.index(key) for key in keys])
    return ranks
""",
    6: """
def mix_skips(self, layers):
    if self.config.skip:
        return [sum(w * H for w, H in zip(row, layers)) for row in self.skip]
    return [layers[-1] for _ in self.decoder]
""",
    7: """
def normalize_patches(tokens):
    centred = tokens - tokens.mean(-1, keepdim=True)
    variance = centred.square().sum(-1, keepdim=True) / (tokens.shape[-1] - 1)
    return centred / torch.sqrt(variance + 1e-6)
""",
    8: """
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
def test_another_right_answer_passes(number):
    names = EXERCISES[number][1]
    assert not any(grade(number, {name: SOLUTIONS[number] for name in names}))

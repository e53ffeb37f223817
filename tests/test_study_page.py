"""The study's curves, verdicts and page, from raw results alone."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from config import UserError
from study.claims import answer, changes, verdicts
from study.curves import HIGHER, LOWER, SPREAD, UNKNOWN, Curves, first_pass
from study.findings import Findings
from study.ledger import Ledger
from study.plan import DATA, EMA, NO_TEACHER
from study.readme import BEGIN, END, fill, summary
from study.report import report, write
from study.settings import ReportConfig
from tests.toy_study import settings

ROOT = Path(__file__).parents[1]


def test_the_page_is_what_the_raw_results_give(tmp_path):
    """docs/reproduction.md, and README's table of the study, hold no number that their own command does not write."""
    page, readme = tmp_path / "reproduction.md", tmp_path / "README.md"
    readme.write_text((ROOT / "README.md").read_text())
    report(ReportConfig(page=page, readme=readme))
    assert readme.read_text() == (ROOT / "README.md").read_text(), "run `python -m study report`"
    assert page.read_text() == (ROOT / "docs" / "reproduction.md").read_text(), "run `python -m study report`"
    for picture in tmp_path.glob("images/*"):
        assert (ROOT / "docs" / "images" / picture.name).is_file()


def lines_of(values, row="reg", data="unlabelled", teacher="supervised", steps=(100, 200, 400)):
    """Raw results: one list of FDs over the steps for each seed."""
    head = {"data": data, "teacher": teacher, "row": row, "weights": EMA, "train_flops_per_image": 10}
    return [
        {**head, "seed": seed, "step": step, "metrics": {"fd_judge": value}}
        for seed, curve in enumerate(values)
        for step, value in zip(steps, curve)
    ]


def test_a_page_of_few_seeds_and_changed_tokens(tmp_path):
    """Too few shared seeds are said as such; words of derived tokens, guidance without labels and no cost do not stop it."""
    level = settings(tmp_path, steps=("100", "200"), lines=("unlabelled supervised sit,reg 0",))
    level = replace(level, headline=200)
    sit = lines_of([[9, 8], [9, 8.1], [9, 8.2], [9, 8.3]], "sit", teacher=NO_TEACHER, steps=(100, 200))
    reg = lines_of([[9, 6], [9, 6.1], [9]], steps=(100, 200))
    few = [*lines_of([[7, 6]], teacher="random", steps=(100, 200)), *lines_of([[3]], data="labelled", steps=(200,))]
    other = lines_of([[5]], data="unlabelled:token-empty", steps=(200,))
    guided = [{**x, "weights": "ema guided 2 1 0.8"} for x in (*reg[-1:], *few[:1])]
    oracles = [{**other[0], "row": "oracle token", "data": d, "weights": "", "metrics": {"token_fd": 1}} for d in DATA]
    oracles.append({**oracles[0], "data": "unlabelled:token-empty"})
    floor = {"row": "held-out", "metrics": {"fd_judge": 1.0}}
    ledger = Ledger(level.results / "digits.jsonl")
    for number, line in enumerate([*sit, *reg, *few, *other, *guided, *oracles, floor]):
        cost = {"training": None if number else 3600.0, "judging": 0.0}
        ledger.append({"key": str(number), "machine": {}, "cpu_seconds": cost, **line})
    write(tmp_path / "page.md", [level])
    text = (tmp_path / "page.md").read_text()
    assert (
        "- **SiT + REG against SiT**: lower in 0 and higher in 0 of 1 comparisons\n  - within the spread: Digits"
        in text
    )
    assert "\nSiT + REG against SiT | without labels | supervised | 2 to 3 | · | too few seeds | \n" in text
    assert "SiT + REG, supervised | 15.2 | 6.00, 6.10 | 6.0, 6.1 | too few seeds" in text
    assert "without labels, SiT + REG, supervised | 2 | 1 | 0.8 |  | 9.00\n" in text
    assert "without labels, SiT + REG, random | 2 | 1 | 0.8 |  | 7.00\n" in text
    assert text.count("held-out images' own tokens") == 2
    curves = Curves(ledger.lines(), EMA)
    pair = [curves.row("unlabelled", teacher, name) for teacher, name in (("random", "reg"), ("random", "sit"))]
    assert curves.verdict(*pair, 200, "fd_judge") == UNKNOWN


def test_the_same_runs_on_two_machines(tmp_path):
    """What rounding does stands beside what the seed does; rows of two machines in one comparison are said as such."""
    level = settings(tmp_path, steps=("100",), lines=("unlabelled supervised sit,reg 0,1,2",))
    level = replace(level, headline=100)
    sit = lines_of([[9], [10], [11]], "sit", teacher=NO_TEACHER, steps=(100,))
    lines = [{**x, "key": f"k{n}", "machine": {"gpu": "G"}} for n, x in enumerate([*sit, *lines_of([[4], [5], [6]])])]
    lines = [{**x, "cpu_seconds": {"training": None, "judging": 0.0}} for x in lines]
    lines[-1]["machine"] = {"processor": "C"}
    for line in lines:
        Ledger(level.results / "digits.jsonl").append(line)
        line = {**line, "machine": {"processor": "C"}, "metrics": {"fd_judge": line["metrics"]["fd_judge"] * 1.02}}
        if line["row"] == "sit":
            Ledger(level.results / "again" / "digits.jsonl").append(line)
    Ledger(level.results / "digits.jsonl").append(
        {"key": "f", "row": "held-out", "metrics": {"fd_judge": 1.0}, "machine": {}}
    )
    (found,) = write(tmp_path / "page.md", [level])
    text = (tmp_path / "page.md").read_text()
    assert "fd_judge | 3 | 2 % | 2 % | 11 %" in text and "apart on C and G, median" in text
    assert "With the second runs in the place of the first, 0 of 1 verdicts in all feature spaces are others.\n" in text
    assert "against SiT**: lower in 1 and higher in 0 of 1 comparisons\n  - lower: Digits without labels, " in text
    assert "supervised teacher (after 100 steps)\n" in text
    assert "on: Digits without labels (supervised teacher). It has none on: nothing.**" in text
    assert "SiT + REG against SiT | without labels | supervised | 3 on C and G | **lower** | \n" in text
    readme = tmp_path / "README.md"
    readme.write_text("top\n")
    with pytest.raises(UserError, match=r"README\.md has no place for the table"):
        fill(readme, [])
    readme.write_text(f"top\n{BEGIN}\nold\n{END}\nrest\n")
    fill(readme, summary(found))
    assert readme.read_text() == f"top\n{BEGIN}\nimages | SiT | SiT + REPA | SiT + REG\n-|-|-|-\n{END}\nrest\n"
    Ledger(level.results / "digits.jsonl").append(
        {**lines_of([[7]], "repa", steps=(100,))[0], "key": "r", "machine": {}}
    )
    (line,) = summary(Findings(level))
    assert line == ["Digits without labels, 100 steps", "9.00, 10.00, 11.00", "7.00", "**4.00, 5.00, 6.00**"]


def test_a_difference_in_one_space_alone(tmp_path):
    """Is said of that space, and of no more than it."""
    level = settings(tmp_path, steps=("100", "200"), lines=("unlabelled supervised sit,reg 0,1,2",))
    sit = lines_of([[9, 8], [9, 8.1], [9, 8.2]], "sit", teacher=NO_TEACHER, steps=(100, 200))
    for number, line in enumerate([*sit, *lines_of([[9, 6], [9, 6.1], [9, 6.2]], steps=(100, 200))]):
        line["metrics"]["fd_other"] = 1.0
        Ledger(level.results / "digits.jsonl").append({"key": str(number), **line})
    (line,) = verdicts(found := Findings(level))[1:]
    assert line[:6] == ["SiT + REG against SiT", "without labels", "supervised", "3", "·", "lower: judge"]
    assert "  - within the spread" in answer([found], "reg", "sit") and changes(found) is None
    for number, line in enumerate(lines_of([[5, 7], [6, 7.1], [5, 7.2]], "reg+class-coeff=0.1", steps=(100, 200))):
        line["metrics"]["fd_other"] = 1.0
        Ledger(level.results / "digits.jsonl").append({"key": f"c{number}", **line})
    name = "without labels: SiT + REG, --class-coeff 0.1, supervised"
    assert changes(Findings(replace(level, headline=100))) == (
        f"- **Changes of a row, Digits**\n  - lower in the space of judge alone: {name} (after 100 steps)\n"
        f"  - higher in the space of judge alone: {name} (after 200 steps)"
    )


def test_when_a_value_is_reached():
    """EP@k on a curve that is linear in log(step) is exact between checkpoints; rising curves are the same upside down."""
    steps, curve = [100, 300, 900], lambda step: 20 - 3 * np.log(step)
    values = [curve(step) for step in steps]
    for step in (150, 300, 899):
        assert first_pass(steps, values, curve(step)) == pytest.approx(step)
        assert first_pass(steps, [-v for v in values], -curve(step), larger=True) == pytest.approx(step)
    assert first_pass(steps, values, curve(950)) is None and first_pass(steps, values, curve(50)) == 100


def test_curves_compare_the_seeds_that_both_have():
    """A row without a teacher stands beside each; a difference counts if no value of one reaches those of the other."""
    sit = lines_of([[9, 8, 5], [9.5, 7, 4], [8.8, 7.5, 5]], "sit", teacher=NO_TEACHER)
    curves = Curves(
        [*sit, *lines_of([[9, 6, 4.5], [9.2, 6.5, 4.4], [9, 6.2, 4.2]]), {"row": "held-out", "metrics": {}}], EMA
    )
    plain, reg = curves.row("unlabelled", "supervised", "sit"), curves.row("unlabelled", "supervised", "reg")
    assert plain.teacher == NO_TEACHER and curves.steps(reg) == [100, 200, 400]
    verdicts = [curves.verdict(reg, plain, step, "fd_judge") for step in (100, 200, 400, 800)]
    assert verdicts == [SPREAD, LOWER, SPREAD, UNKNOWN] and curves.verdict(plain, reg, 200, "fd_judge") == HIGHER
    assert curves.at(plain, 200, "fd_judge") == {0: 8, 1: 7, 2: 7.5}
    passed = curves.passes(reg, "fd_judge", 6.5)
    assert passed[1] == pytest.approx(200) and 100 < passed[0] < 200

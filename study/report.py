"""docs/reproduction.md and its pictures from the raw results alone: `python -m study report`."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.files import write_text
from common.reporting import say
from evaluations.results import as_markdown
from evaluations.seeds import mean_of
from study.curves import HIGHER, LOWER, SPREAD, UNKNOWN, Curves, Row
from study.figures import draw_curves, draw_samples
from study.ledger import Ledger
from study.machines import AGAIN, agreement, kind
from study.plan import DATA, EMA, IN_WORDS, NO_TEACHER, RAW, TITLES, judgements, runs
from study.readme import fill, summary
from study.settings import LEVELS, ReportConfig, StudyConfig, recipe

ROOT = Path(__file__).parents[1]
PAIRS = (("reg", "sit"), ("repa", "sit"), ("reg", "repa"))
PAPER = {
    "sit": 33.0,
    "token": 26.7,
    "repa": 22.4,
    "token-patch": 15.5,
    "reg": 15.2,
}  # B/2, 400K steps, unguided, FID-50K
AGREEMENT = {LOWER: "agrees", HIGHER: "the opposite", SPREAD: "not seen: within the spread", UNKNOWN: UNKNOWN}


class Space(NamedTuple):
    """A judge's feature space: its name in the metrics, and whether smaller is better."""

    key: str
    title: str


class Page:
    """One level's part of the page."""

    def __init__(self, settings: StudyConfig, images: Path) -> None:
        self.settings, self.images = settings, images
        self.lines = Ledger(settings.results / f"{settings.level}.jsonl").lines()
        self.curves, self.raw = Curves(self.lines, EMA), Curves(self.lines, RAW)
        fds = dict.fromkeys(key for line in self.lines for key in line["metrics"] if key.startswith("fd_"))
        own_first = sorted(fds, key=lambda key: key != "fd_judge")  # the level's own judge, where it has one
        self.spaces = [Space(key, key.removeprefix("fd_")) for key in own_first]
        self.steps = sorted({step for row in self.curves.runs for step in self.curves.steps(row)})
        self.floors = {
            line["row"]: line["metrics"] for line in self.lines if line["row"] in ("held-out", "reconstructions")
        }

    def teachers(self, data: str) -> list[str]:
        """Those whose rows have been measured, in the order of the recipe."""
        named = dict.fromkeys(s.teacher for s in runs(self.settings) if s.data == data and s.teacher != NO_TEACHER)
        measured = {row.teacher for row in self.curves.runs if row.data == data}
        return [teacher for teacher in named if teacher in measured]

    def rows(self, data: str, teacher: str) -> list[Row]:
        """The measured rows of one teacher, SiT first."""
        found = [self.curves.row(data, teacher, name) for name in TITLES]
        return [row for row in found if row in self.curves.runs]

    def claims(self) -> Iterable[str]:
        """A sentence for each teacher and pair of rows: where one is ahead in all spaces."""
        for data in DATA:
            for teacher in self.teachers(data):
                for name, other in PAIRS:
                    row, base = (self.curves.row(data, teacher, one) for one in (name, other))
                    both = {s: self.curves.shared(row, base, s, self.spaces[0].key) for s in self.steps}
                    shared = {step: len(seeds) for step, seeds in both.items()}
                    verdicts = {step: self.verdict(row, base, step) for step, seeds in both.items() if seeds}
                    if not verdicts:
                        continue
                    known = [step for step, verdict in verdicts.items() if verdict != UNKNOWN]
                    counts = sorted({shared[step] for step in known or verdicts})
                    seeds = f"{' to '.join(map(str, counts[:: max(len(counts) - 1, 1)]))} seed{'s' * (counts[-1] != 1)}"
                    where = f"{LEVELS[self.settings.level]} {IN_WORDS[data]}, {teacher} teacher"
                    kinds = self.machines(row, *both.values()) | self.machines(base, *both.values())
                    mixed = f"; on {' and '.join(sorted(kinds))}" if len(kinds) > 1 else ""
                    pair = f"{TITLES[name]} against {TITLES[other]} ({seeds}{mixed})"
                    inside = [step for step, verdict in verdicts.items() if verdict == SPREAD]
                    own = {step: self.curves.verdict(row, base, step, self.spaces[0].key) for step in inside}
                    alone = in_words({step: one for step, one in own.items() if one != SPREAD}, self.spaces[0].title)
                    said = "; ".join([in_words(verdicts), *([alone] if alone else [])])
                    yield f"- {where}, {pair}: {said if known else 'too few seeds to say'}."

    def machines(self, row: Row, *seeds: Sequence[int]) -> set[str]:
        """Those that the judged steps of a row come from, of these lists of seeds alone if any are given."""
        known = self.curves.machines.items()
        wanted = {seed for some in seeds for seed in some} if seeds else {seed for (_, seed), _ in known}
        return {name for (one, seed), names in known if one == row and seed in wanted for name in names}

    def verdict(self, row: Row, base: Row, step: int) -> str:
        """The verdict if all spaces agree on it; else that nothing is known beyond the spread."""
        found = {self.curves.verdict(row, base, step, space.key) for space in self.spaces}
        return found.pop() if len(found) == 1 else UNKNOWN if UNKNOWN in found else SPREAD

    def table(self, rows: Sequence[Row], key: str, digits: int, title: str) -> list[list[str]]:
        """Rows by steps, floors last."""
        body = []
        for row in rows:
            values = [list(self.curves.at(row, step, key).values()) for step in self.steps]
            if any(values):
                cells = [mean_of(v).text(digits) if v else "-" for v in values]
                body.append([label(row), *cells])
        for name, metrics in self.floors.items():
            if key in metrics:
                body.append([f"{name} images" if name == "held-out" else name, *[f"{metrics[key]:.{digits}f}"] * 1])
                body[-1] += [""] * (len(self.steps) - 1)
        return [[title, *map(str, self.steps)], *body]

    def efficiency(self, rows: Sequence[Row], key: str) -> list[list[str]]:
        """EP@k at SiT's own values: how many times fewer steps, and fewer FLOPs, a row needs for the value."""
        base = next((row for row in rows if row.row == "sit"), None)
        body = []
        for step in self.steps[1:] if base else []:
            assert base is not None
            reached = self.curves.at(base, step, key)
            for row in [row for row in rows if row != base]:
                passed = self.curves.passes(row, key, float(np.mean(list(reached.values()))))
                known = [value for value in passed.values() if value is not None]
                if len(known) < len(passed) or min(known) <= self.steps[0]:
                    continue  # a seed does not reach it, or was past it at its first checkpoint
                factors = [step / value for value in known]
                flops = [factor * self.curves.flops[base] / self.curves.flops[row] for factor in factors]
                cells = [mean_of(known).text(0), mean_of(factors).text(2), mean_of(flops).text(2)]
                body.append([str(step), f"{np.mean(list(reached.values())):.2f}", label(row), *cells])
        return [["SiT's steps", "its mean value", "row", "steps to reach it", "fewer steps", "fewer FLOPs"], *body]

    def paper(self, rows: Sequence[Row]) -> list[list[str]]:
        """The paper's FID beside ours, and whether the direction against SiT agrees."""
        step, space = self.settings.headline, self.spaces[0]
        base = next((row for row in rows if row.row == "sit"), None)
        body = []
        for row in rows:
            values = list(self.curves.at(row, step, space.key).values())
            if row.row not in PAPER or base is None or not values:
                continue
            verdict = self.verdict(row, base, step) if row != base else ""
            agrees = AGREEMENT.get(verdict, "")
            ratio = float(np.mean(values)) / self.floors["held-out"][space.key]
            body.append([label(row), f"{PAPER[row.row]:.1f}", mean_of(values).text(2), f"{ratio:.1f}", agrees])
        return [["row", "paper, FID at 400K", f"here, FD {space.title} at {step}", "FDr", "lower than SiT"], *body]

    def tokens(self) -> list[list[str]]:
        """What is known of the class token and of the layers, after the last step."""
        keys = {
            "cknna": "CKNNA of the layers",
            "token_denoised_cosine": "denoised token, cosine",
            "token_cosine": "with its picture, cosine",
            "token_cosine_shuffled": "with another picture",
            "token_retrieval": "own picture is nearest",
            "token_fd": "FD of tokens",
        }
        body, last = [], self.steps[-1]
        for row in [row for row in self.curves.runs if row.data in DATA and row.row in TITLES]:
            values = [list(self.curves.at(row, last, key).values()) for key in keys]
            if any(values):
                cells = [mean_of(v).text(3) if v else "" for v in values]
                body.append([f"{IN_WORDS[row.data]}, {row.teacher}, {label(row)}", *cells])
        for line in self.lines:
            if line["row"] == "oracle token" and line["data"] in DATA:
                name = f"{IN_WORDS[line['data']]}, {line['teacher']}, held-out images' own tokens"
                body.append([name, "", "", "1", "", "1", f"{line['metrics']['token_fd']:.3f}"])
        return [["after the last step", *keys.values()], *body]

    def ablations(self) -> list[list[str]]:
        """Changed settings and class tokens beside the row that they change, at the headline's step and the last one."""
        changed = [row for row in self.curves.runs if row.data not in DATA or row.row not in TITLES]
        plain = [Row(row.data.split(":")[0], row.teacher, row.row.split("+")[0]) for row in changed]
        steps, body = (self.settings.headline, self.steps[-1]), []
        for row in [*dict.fromkeys(plain), *changed]:
            values = [list(self.curves.at(row, step, s.key).values()) for s in self.spaces for step in steps]
            body.append([" ".join(row), *(mean_of(v).text(2) if v else "-" for v in values)])
        return [["data, teacher, row", *(f"FD {s.title} at {step}" for s in self.spaces for step in steps)], *body]

    def guided(self) -> list[list[str]]:
        """The map of guidance: scale, scale of the class token, upper end of the interval."""
        found: dict[tuple[str, ...], list[Mapping[str, float]]] = {}
        for line in self.lines:
            _, _, words = line.get("weights", "").partition(" guided ")
            if words:
                row = Row(line["data"], line["teacher"], line["row"])
                name = f"{IN_WORDS.get(row.data, row.data)}, {label(row)}"
                found.setdefault((name, *words.split()), []).append(line["metrics"])
        keys, body = ("class_accuracy", *(space.key for space in self.spaces)), []
        for names, metrics in found.items():
            columns = [[one[key] for one in metrics if key in one] for key in keys]
            body.append([*names, *(mean_of(values).text(2) if values else "" for values in columns)])
        return [["row", "scale", "of the token", "interval to", *keys], *body]

    def missing(self) -> tuple[list[list[str]], float, str]:
        """Runs of the recipe that are not finished, and the processor hours that they will take on which machine."""
        names = ("data", "teacher", "row", "seed", "step", "weights")
        done = {tuple(line[name] for name in names) for line in self.lines if "step" in line}
        judged = [line for line in self.lines if line.get("weights") == EMA]
        machine = max(kinds := list(map(kind, judged)), key=kinds.count)
        costs = [
            (line["cpu_seconds"], self.settings.steps[-1] / line["step"]) for line in judged if kind(line) == machine
        ]
        judging = float(np.mean([cost["judging"] for cost, _ in costs])) if costs else 0.0
        training = max((cost["training"] * rest for cost, rest in costs if cost["training"] is not None), default=0.0)
        count: dict[tuple[str, str, str], list[int]] = {}
        for spec in runs(self.settings):
            run = (spec.data, spec.teacher, spec.row, spec.seed)
            if not done.issuperset((*run, *one) for one in judgements(spec, self.settings)):
                row = spec.row + " guided" * spec.guided
                count.setdefault((spec.data, spec.teacher, row), []).append(spec.seed)
        hours = sum(map(len, count.values())) * (training + judging * (len(self.settings.steps) + 1)) / 3600
        body = [
            [IN_WORDS.get(d, d), t, TITLES.get(r, r), ", ".join(map(str, seeds))] for (d, t, r), seeds in count.items()
        ]
        return [["images", "teacher", "row", "seeds"], *body], hours, machine

    def text(self) -> str:
        """Markdown of the level, with its pictures written."""
        level, parts = self.settings.level, [f"## {LEVELS[self.settings.level]}\n"]
        for data in DATA:
            rows = list(dict.fromkeys(row for teacher in self.teachers(data) for row in self.rows(data, teacher)))
            if not rows:
                continue
            named = [(label(row), row) for row in rows]
            panels = [(f"{IN_WORDS[data]}: FD {space.title}", space.key, named) for space in self.spaces]
            named_classes = any(self.curves.at(row, step, "class_accuracy") for row in rows for step in self.steps)
            if named_classes:
                panels.append(("with labels: class accuracy", "class_accuracy", named))
            panels.append((f"{IN_WORDS[data]}: CKNNA with the teacher", "cknna", named))
            file = self.images / f"study-{level}-{data}.png"
            draw_curves(file, self.curves, panels)
            parts.append(f"### {IN_WORDS[data].capitalize()}\n\n![Curves of all rows](images/{file.name})\n")
            for space in self.spaces:
                parts.append(as_markdown(self.table(rows, space.key, 2, f"FD {space.title}")))
                mind = space.key.replace("fd_", "mind_")
                parts.append(as_markdown(self.table(rows, mind, 2, f"MIND {space.title}")))
            if named_classes:
                parts.append(as_markdown(self.table(rows, "class_accuracy", 3, "class accuracy")))
            for teacher in self.teachers(data):
                own = self.rows(data, teacher)
                for space in self.spaces:
                    table = self.efficiency(own, space.key)
                    if len(table) > 1:
                        parts.append(f"EP@k, {teacher} teacher: when a row reaches SiT's FD {space.title}.\n")
                        parts.append(as_markdown(table))
                parts.append(f"Beside the paper, {teacher} teacher.\n")
                parts.append(as_markdown(self.paper(own)))
            parts.append(self.samples(data, rows))
        parts.append("### Class tokens and layers\n\n" + as_markdown(self.tokens()))
        again = Ledger(self.settings.results / AGAIN / f"{level}.jsonl").lines()
        twice = agreement(self.lines, again, [*(space.key for space in self.spaces), "class_accuracy", "cknna"])
        tables = {
            "Ablations": self.ablations(),
            "Guidance, after the last step": self.guided(),
            "The same runs on two machines": twice,
        }
        for title, table in tables.items():
            if len(table) > 1:
                parts.append(f"### {title}\n\n" + as_markdown(table))
        return "\n".join([*parts, self.closing()])

    def samples(self, data: str, rows: Sequence[Row]) -> str:
        """The sheet of samples of seed 0, where the pictures were kept."""
        folder, grid = self.settings.results / "pictures" / self.settings.level, []
        few = dict.fromkeys((self.steps[0], self.settings.headline, self.steps[-1]))
        for row in [row for row in rows if row.row in ("sit", "repa", "reg")]:
            named = [(f"{s} steps", folder / f"{data}-{row.teacher}-{row.row}-{s}.png") for s in few]
            found = [(caption, path) for caption, path in named if path.is_file()]
            grid += [(label(row), found)] if found else []
        if not grid:
            return ""
        file = self.images / f"study-{self.settings.level}-{data}-samples.png"
        draw_samples(file, grid)
        return f"![The same noise in all rows, seed 0](images/{file.name})\n"

    def closing(self) -> str:
        """Teachers, weights, machines, and what is still missing."""
        parts = ["### Teachers, weights and machines\n"]
        for line in self.lines:
            if "psnr" in line["metrics"]:
                parts.append(f"- VAE: held-out images come back at {line['metrics']['psnr']:.1f} dB PSNR.")
            if line["row"] == "teacher":
                share = line["metrics"]["linear_accuracy"]
                parts.append(f"- {line['teacher']}: a linear head names {share:.1%} of the held-out images.")
        key, last = self.spaces[0].key, self.steps[-1]
        for row in [row for row in self.curves.runs if row.data in DATA and row.row in TITLES]:
            ema, raw = self.curves.at(row, last, key), self.raw.at(row, last, key)
            if raw:
                average, plain = (mean_of(list(side.values())).text(2) for side in (ema, raw))
                title = f"{IN_WORDS[row.data]}, {label(row)}: FD {self.spaces[0].title}"
                parts.append(f"- {title} {average} with averaged weights, {plain} with raw ones.")
        machines = {str(sorted(line["machine"].items())): line["machine"] for line in self.lines}
        networks = {str(line["networks"].get("vae")) for line in self.lines if "networks" in line}
        for text, machine in machines.items():
            words = ", ".join(f"{name} {value}" for name, value in machine.items())
            count = sum(str(sorted(line["machine"].items())) == text for line in self.lines)
            parts.append(f"- Machine of {count} lines of the raw results: {words}.")
        together = [row for row in self.curves.runs if len(self.machines(row)) > 1]
        for row in together:
            names = " and ".join(sorted(self.machines(row)))
            parts.append(f"- {IN_WORDS.get(row.data, row.data)}, {label(row)}: judged on {names}.")
        if len(networks) > 1:
            parts.append(f"- The small networks were trained {len(networks)} times, by different arithmetic.")
        table, hours, machine = self.missing()
        if len(table) > 1:
            cost = f"About {hours:.1f} processor hours on {machine}; `python -m study {self.settings.level}`."
            parts.append(f"\n### Not finished\n\n{cost}\n")
            parts.append(as_markdown(table))
        return "\n".join(parts) + "\n"


def label(row: Row) -> str:
    """Title of a row, and its teacher where it has one."""
    title = TITLES.get(row.row, row.row)
    return title if row.teacher == NO_TEACHER else f"{title}, {row.teacher}"


def in_words(verdicts: dict[int, str], space: str = "") -> str:
    """`lower in all feature spaces after 500, 750 steps; within the spread ...`, or of one space alone."""
    parts = []
    for verdict in (LOWER, HIGHER):
        steps = [f"{step:,}" for step, found in verdicts.items() if found == verdict]
        if steps:
            where = f"the space of {space} alone" if space else "all feature spaces"
            parts.append(f"{verdict} in {where} after {', '.join(steps)} steps")
    inside = [f"{step:,}" for step, found in verdicts.items() if found == SPREAD]
    if inside:
        parts.append(f"within the spread of the seeds, or not in all feature spaces, after {', '.join(inside)} steps")
    few = [f"{step:,}" for step, found in verdicts.items() if found == UNKNOWN]
    if few:
        parts.append(f"{UNKNOWN} after {', '.join(few)} steps")
    return "; ".join(parts)


def report(settings: ReportConfig) -> None:
    """Write the page, its pictures and README's table from the raw results of all levels that have any."""
    found = write(settings.page, [recipe(level, "--results", str(settings.results)) for level in LEVELS])
    fill(settings.readme, [line for one in found for line in summary(one.settings, one.curves, one.spaces[0].key)])


def write(page: Path, levels: Sequence[StudyConfig]) -> list[Page]:
    """The page of these levels; returns the parts of those that have results."""
    found = [one for one in (Page(settings, page.parent / "images") for settings in levels) if one.steps]
    claims = "\n".join(line for one in found for line in one.claims())
    head = (ROOT / "study" / "page.md").read_text(encoding="utf-8").replace("CLAIMS", claims)
    write_text(page, "\n".join([head, *(one.text() for one in found)]).rstrip() + "\n")
    say(f"{page}: {', '.join(one.settings.level for one in found)}")
    return found

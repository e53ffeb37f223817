"""docs/reproduction.md and its pictures from the raw results alone: `python -m study report`."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from common.files import write_text
from common.reporting import say
from evaluations.results import as_markdown
from evaluations.seeds import mean_of
from study.claims import answers, cell, sentence, turned, verdicts
from study.curves import HIGHER, LOWER, SPREAD, UNKNOWN, Row
from study.figures import Panel, draw_curves, draw_samples
from study.findings import Findings, label, sit_of
from study.ledger import Ledger
from study.machines import AGAIN, agreement, kind
from study.plan import DATA, EMA, IN_WORDS, TITLES, data_title, judgements, row_title, runs
from study.readme import fill, summary
from study.settings import LEVELS, ReportConfig, StudyConfig, recipe

ROOT = Path(__file__).parents[1]
PAPER = {
    "sit": 33.0,
    "token": 26.7,
    "repa": 22.4,
    "token-patch": 15.5,
    "reg": 15.2,
}  # B/2, 400K steps, unguided, FID-50K
AGREEMENT = {LOWER: "agrees", HIGHER: "the opposite", SPREAD: "not seen: within the spread", UNKNOWN: UNKNOWN}


class Page(Findings):
    """One level's part of the page."""

    def __init__(self, settings: StudyConfig, images: Path) -> None:
        super().__init__(settings)
        self.images = images

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
        base = sit_of(rows)
        body = []
        for step in self.steps[1:] if base else []:
            assert base is not None
            for row in [row for row in rows if row != base]:
                reached = self.reached(row, base, step, key)
                if reached:
                    value = np.mean(list(self.curves.at(base, step, key).values()))
                    cells = [cell.text(digits) for cell, digits in zip(reached, (0, 2, 2))]
                    body.append([str(step), f"{value:.2f}", label(row), *cells])
        return [["SiT's steps", "its mean value", "row", "steps to reach it", "fewer steps", "fewer FLOPs"], *body]

    def paper(self, rows: Sequence[Row]) -> list[list[str]]:
        """The paper's FID beside ours, and whether the direction against SiT agrees."""
        step, space = self.settings.headline, self.spaces[0]
        base = sit_of(rows)
        body = []
        for row in rows:
            values = list(self.curves.at(row, step, space.key).values())
            if row.row not in PAPER or base is None or not values:
                continue
            verdict = self.verdict(row, base, step) if row != base else ""
            agrees = AGREEMENT.get(verdict, "")
            ratios = [value / self.floors["held-out"][space.key] for value in values]
            cells = [mean_of(values).text(2), mean_of(ratios).text(1)]
            body.append([label(row), f"{PAPER[row.row]:.1f}", *cells, agrees])
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
                body.append([f"{IN_WORDS[row.data]}, {label(row)}", *cells])
        for line in self.lines:
            if line["row"] == "oracle token" and line["data"] in DATA:
                name = f"{IN_WORDS[line['data']]}, {line['teacher']}, held-out images' own tokens"
                body.append([name, "", "", "1", "", "1", f"{line['metrics']['token_fd']:.3f}"])
        return [["after the last step", *keys.values()], *body]

    def ablations(self) -> list[list[str]]:
        """Changed settings and class tokens beside the row that they change, at the headline's step and the last one."""
        plain = self.changed()
        steps, body = (self.settings.headline, self.steps[-1]), []
        for row in [*dict.fromkeys(plain.values()), *plain]:
            values = [list(self.curves.at(row, step, s.key).values()) for s in self.spaces for step in steps]
            against = [cell(self.verdicts(row, plain[row], step)) if row in plain else "" for step in steps]
            names = f"{data_title(row.data)}: {label(row)}"
            body.append([names, *(mean_of(v).text(2) if v else "-" for v in values), *against])
        columns = [f"FD {s.title} at {step}" for s in self.spaces for step in steps]
        return [["row", *columns, *(f"against the first row, at {step}" for step in steps)], *body]

    def guided(self) -> list[list[str]]:
        """The map of guidance: scale, scale of the class token, upper end of the interval."""
        found: dict[tuple[str, ...], list[Mapping[str, float]]] = {}
        for line in self.lines:
            _, _, words = line.get("weights", "").partition(" guided ")
            if words:
                row = Row(line["data"], line["teacher"], line["row"])
                name = f"{data_title(row.data)}, {label(row)}"
                found.setdefault((name, *words.split()), []).append(line["metrics"])
        keys, body = ("class_accuracy", *(space.key for space in self.spaces)), []
        for names, metrics in found.items():
            columns = [[one[key] for one in metrics if key in one] for key in keys]
            body.append([*names, *(mean_of(values).text(2) if values else "" for values in columns)])
        titles = ("class accuracy", *(f"FD {space.title}" for space in self.spaces))
        return [["row", "scale", "of the token", "interval to", *titles], *body]

    def averaged(self) -> list[list[str]]:
        """Averaged weights beside raw ones, after the last step."""
        space, last, body = self.spaces[0], self.steps[-1], []
        for row in [row for row in self.curves.runs if row.data in DATA and row.row in TITLES]:
            ema, raw = (list(side.at(row, last, space.key).values()) for side in (self.curves, self.raw))
            if ema and raw:
                body.append([f"{IN_WORDS[row.data]}: {label(row)}", mean_of(ema).text(2), mean_of(raw).text(2)])
        return [[f"FD {space.title} at {last}", "averaged weights", "raw weights"], *body]

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
        count: dict[tuple[str, str, str, bool], list[int]] = {}
        for spec in runs(self.settings):
            run = (spec.data, spec.teacher, spec.row, spec.seed)
            if not done.issuperset((*run, *one) for one in judgements(spec, self.settings)):
                count.setdefault((spec.data, spec.teacher, spec.row, spec.guided), []).append(spec.seed)
        hours = sum(map(len, count.values())) * (training + judging * (len(self.settings.steps) + 1)) / 3600
        body = [
            [data_title(d), t, row_title(r) + " guided" * g, ", ".join(map(str, seeds))]
            for (d, t, r, g), seeds in count.items()
        ]
        return [["images", "teacher", "row", "seeds"], *body], hours, machine

    def text(self) -> str:
        """Markdown of the level, with its pictures written."""
        parts = [f"## {LEVELS[self.settings.level]}\n"]
        for data in DATA:
            rows = list(dict.fromkeys(row for teacher in self.teachers(data) for row in self.rows(data, teacher)))
            if rows:
                parts += self.section(data, rows)
        again = Ledger(self.settings.results / AGAIN / f"{self.settings.level}.jsonl").lines()
        twice = agreement(self.lines, again, [*(space.key for space in self.spaces), "class_accuracy", "cknna"])
        tables = {
            "Class tokens and layers": self.tokens(),
            "Ablations": self.ablations(),
            "Guidance, after the last step": self.guided(),
            "Averaged and raw weights": self.averaged(),
            "The same runs once more": twice,
        }
        parts += [f"### {title}\n\n" + as_markdown(table) for title, table in tables.items() if len(table) > 1]
        others = turned(self, again)
        return "\n".join([*parts, *([others] if others else []), self.closing()])

    def section(self, data: str, rows: Sequence[Row]) -> list[str]:
        """Curves, samples and tables with labels or without; what fewer readers need is folded."""
        named = [(label(row), row) for row in rows]
        base = sit_of(rows)
        panels = [
            Panel(f"FD {space.title}{' over that of SiT' * bool(base)}", space.key, base) for space in self.spaces
        ]
        named_classes = any(self.curves.at(row, step, "class_accuracy") for row in rows for step in self.steps)
        panels += [Panel("class accuracy", "class_accuracy")] if named_classes else []
        file = self.images / f"study-{self.settings.level}-{data}.png"
        draw_curves(file, self.curves, named, [*panels, Panel("CKNNA with the teacher", "cknna")])
        parts = [f"### {IN_WORDS[data].capitalize()}\n\n![Curves of all rows](images/{file.name})\n"]
        parts.append(self.samples(data, rows))
        parts += [as_markdown(self.table(rows, space.key, 2, f"FD {space.title}")) for space in self.spaces]
        if named_classes:
            parts.append(as_markdown(self.table(rows, "class_accuracy", 3, "class accuracy")))
        folded = []
        for teacher in self.teachers(data):
            own = self.rows(data, teacher)
            parts.append(f"Beside the paper, {teacher} teacher.\n\n" + as_markdown(self.paper(own)))
            for space in self.spaces:
                table = self.efficiency(own, space.key)
                title = f"EP@k, {teacher} teacher: when a row reaches SiT's FD {space.title}.\n\n"
                folded += [title + as_markdown(table)] if len(table) > 1 else []
        for space in self.spaces:
            folded.append(as_markdown(self.table(rows, space.key.replace("fd_", "mind_"), 2, f"MIND {space.title}")))
        return [*parts, fold(f"{IN_WORDS[data].capitalize()}: steps to reach SiT's values (EP@k), and MIND", folded)]

    def samples(self, data: str, rows: Sequence[Row]) -> str:
        """The sheet of samples of seed 0, where the pictures were kept."""
        folder, grid = self.settings.results / "pictures" / self.settings.level, []
        few = list(dict.fromkeys((self.steps[0], self.settings.headline, self.steps[-1])))
        for row in [row for row in rows if row.row in ("sit", "repa", "reg")]:
            named = {step: folder / f"{data}-{row.teacher}-{row.row}-{step}.png" for step in few}
            found = {step: path for step, path in named.items() if path.is_file()}
            grid += [(label(row), found)] if found else []
        if not grid:
            return ""
        file = self.images / f"study-{self.settings.level}-{data}-samples.png"
        draw_samples(file, few, grid)
        return f"![The same noise in all rows, seed 0](images/{file.name})\n"

    def closing(self) -> str:
        """Teachers, weights, machines, and what is still missing."""
        parts = ["### Teachers and machines\n"]
        for line in self.lines:
            if "psnr" in line["metrics"]:
                parts.append(f"- VAE: held-out images come back at {line['metrics']['psnr']:.1f} dB PSNR.")
            if line["row"] == "teacher":
                share = line["metrics"]["linear_accuracy"]
                parts.append(f"- {line['teacher']}: a linear head names {share:.1%} of the held-out images.")
        machines = {str(sorted(line["machine"].items())): line["machine"] for line in self.lines}
        networks = {str(line["networks"].get("vae")) for line in self.lines if "networks" in line}
        for text, machine in machines.items():
            words = ", ".join(f"{name} {value}" for name, value in machine.items())
            count = sum(str(sorted(line["machine"].items())) == text for line in self.lines)
            parts.append(f"- Machine of {count} lines of the raw results: {words}.")
        together = [row for row in self.curves.runs if len(self.machines(row)) > 1]
        for row in together:
            names = " and ".join(sorted(self.machines(row)))
            parts.append(f"- {data_title(row.data)}, {label(row)}: judged on {names}.")
        if len(networks) > 1:
            parts.append(f"- The small networks were trained {len(networks)} times, by different arithmetic.")
        table, hours, machine = self.missing()
        if len(table) > 1:
            cost = f"About {hours:.1f} processor hours on {machine}; `python -m study {self.settings.level}`."
            parts.append(f"\n### Not finished\n\n{cost}\n")
            parts.append(as_markdown(table))
        return "\n".join(parts) + "\n"


def fold(title: str, parts: Sequence[str]) -> str:
    """Markdown that a reader opens."""
    return "\n".join([f"<details><summary>{title}</summary>\n", *parts, "</details>\n"])


def report(settings: ReportConfig) -> None:
    """Write the page, its pictures and README's table from the raw results of all levels that have any."""
    found = write(settings.page, [recipe(level, "--results", str(settings.results)) for level in LEVELS])
    fill(settings.readme, [line for one in found for line in summary(one)])


def write(page: Path, levels: Sequence[StudyConfig]) -> list[Page]:
    """The page of these levels; returns the parts of those that have results."""
    found = [one for one in (Page(settings, page.parent / "images") for settings in levels) if one.steps]
    tables = "\n".join(f"{LEVELS[x.settings.level]}:\n\n{as_markdown(verdicts(x))}" for x in found)
    head = (ROOT / "study" / "page.md").read_text(encoding="utf-8")
    for word, text in (("SENTENCE", sentence(found)), ("ANSWERS", "\n".join(answers(found))), ("VERDICTS", tables)):
        head = head.replace(word, text)
    write_text(page, "\n".join([head, *(one.text() for one in found)]).rstrip() + "\n")
    say(f"{page}: {', '.join(one.settings.level for one in found)}")
    return found

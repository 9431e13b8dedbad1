"""Turns a CSV of sweep.sh into the tables of README.md and into figures beside the CSV.

    python results/report.py results/sweep.csv            # write them
    python results/report.py results/sweep.csv --check    # only fail if they are not what the CSV gives

A block of README.md from <!-- report:sweep NAME --> to <!-- /report --> holds the table NAME of sweep.csv,
one of summary, runs, pe_type, n_embd, n_head, n_layer, seeds, published. Where README.md has no block of a
CSV, its tables are printed. The CSV may hold any part of the sweep, with one seed a run or several, but only
one setting of all other flags. seed.csv holds the losses that were published for the experiment.
"""
import argparse
import csv
import hashlib
import math
import re
import statistics
import sys
from collections import Counter, defaultdict
from functools import partial
from itertools import combinations, cycle, product
from pathlib import Path
from typing import NamedTuple

try:
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D
except ImportError:
    sys.exit("report.py: error: matplotlib is missing; pip install -r requirements.txt brings it")

README = Path(__file__).resolve().parents[1] / "README.md"
PUBLISHED = Path(__file__).with_name("seed.csv")
COLUMNS = PUBLISHED.read_text(encoding="utf-8").split("\n")[0].split(",")  # of every CSV of the scripts
SETTINGS = COLUMNS[COLUMNS.index("pe_at"):COLUMNS.index("seed")]
LOSSES = {"val_loss": "val loss", "train_loss": "train loss"}
PES = {"None": "black", "randn": "#e69f00", "sinpe": "#0072b2", "rope": "#009e73"}  # and their colours
GRIDS = [((384, 768), (6, 8, 12)), ((96, 192), (3, 4, 6))]  # widths and depths of sweep.sh, and with --tiny


class Run(NamedTuple):
    """What tells the runs of a sweep apart."""
    experiment: str
    pe_type: str
    n_embd: int
    n_head: int
    n_layer: int

    def __str__(self):
        pe = "" if self.pe_type == "None" else f" {self.pe_type}"
        return f"{self.experiment}{pe} {self.n_embd}/{self.n_head}/{self.n_layer}"


FACTORS = Run._fields[1:]  # each has its table


def fail(message, status=2):
    """End the program with one line on standard error; status 1 says that --check found a difference."""
    print(f"report.py: error: {message}", file=sys.stderr)
    sys.exit(status)


# --- Reading -----------------------------------------------------------------------------------------------

def read(path):
    """A CSV of the scripts -> {Run: [row of each seed]}, every row a dict of strings."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            header, *lines = [*csv.reader(file)] or [COLUMNS]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        fail(f"{path}: {error}")
    if header != COLUMNS:
        fail(f"{path}: it is not a CSV of the sweep")
    runs = defaultdict(list)
    for number, cells in enumerate(lines, 2):
        try:
            row = dict(zip(COLUMNS, cells, strict=True))
            run = Run(row["experiment"], row["pe_type"], *(int(row[name]) for name in FACTORS[1:]))
            [float(row[name]) for name in COLUMNS if "loss" in name and row[name]]
            if run.pe_type not in PES:
                raise ValueError
        except ValueError:
            fail(f"{path}: line {number} is damaged")
        if row["seed"] in (other["seed"] for other in runs[run]):
            fail(f"{path}: line {number} is the second of {run} with seed {row['seed']}")
        runs[run].append(row)
    for name in SETTINGS:
        values = {row[name] for rows in runs.values() for row in rows} - {""}
        if len(values) > 1:
            fail(f"{path}: rows differ in {name} ({', '.join(sorted(values))}); a report is of one setting")
    return dict(runs)


def losses(rows, name):
    """The loss (or another number) of every seed that has it."""
    return [float(row[name]) for row in rows if row[name]]


def mean(rows, name):
    """Mean loss over seeds, or None."""
    values = losses(rows, name)
    return statistics.mean(values) if values else None


def spread(rows, name):
    """Standard deviation over seeds, 0 where there is but one."""
    values = losses(rows, name)
    return statistics.stdev(values) if len(values) > 1 else 0.0


def missing(runs):
    """The runs of the sweep that have no row; of the two grids, the one that the CSV has more runs of."""
    grids = []
    for widths, depths in GRIDS:
        grid = [Run(script, "None", widths[0], 6, depths[0]) for script in ("gpt", "gpt_v2")]
        grid += [Run("gpt_v3", *run) for run in product(list(PES)[1:], widths, (6, 8, 12), depths)]
        grids.append([run for run in grid if run not in runs])
    return min(grids, key=len)


def matched(runs, factor, name):
    """gpt_v3 runs that differ in the factor alone -> levels, {configuration: {level: rows}}."""
    table = defaultdict(dict)
    for run, rows in runs.items():
        if run.experiment == "gpt_v3" and losses(rows, name):
            rest = tuple(getattr(run, other) for other in FACTORS if other != factor)
            table[rest][getattr(run, factor)] = rows
    levels = {level for row in table.values() for level in row}
    return sorted(levels, key=list(PES).index if factor == "pe_type" else None), table


def paired(runs, name, published, published_name):
    """(our mean loss, the published one) of every run that both have with equal settings."""
    pairs = []
    for run, (theirs,) in published.items():
        ours = runs.get(run, [])
        if theirs[published_name] and losses(ours, name) and all(
                same(ours[0][setting], theirs[setting]) for setting in SETTINGS):
            pairs.append((mean(ours, name), float(theirs[published_name])))
    return pairs


def same(a, b):
    """Whether two cells agree, an empty one with all; numbers by value."""
    try:
        return not a or not b or float(a) == float(b)
    except ValueError:
        return a == b


def spearman(pairs):
    """Rank correlation of (x, y) pairs, ties at their mean rank; None where there is none."""
    def ranks(values):
        return [sum(other < value for other in values) + (values.count(value) + 1) / 2 for value in values]
    columns = [ranks(values) for values in zip(*pairs)]
    if len(pairs) < 2 or any(len(set(column)) == 1 for column in columns):
        return None
    return statistics.correlation(*columns)


# --- Tables ------------------------------------------------------------------------------------------------

def markdown(header, rows):
    """A Markdown table, numbers to the right."""
    align = ["---:" if re.match(r"[-+−*\d]", str(cell)) else "---" for cell in (rows or [header])[0]]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (header, align, *rows))


def folded(summary, table):
    return f"<details><summary>{summary}</summary>\n\n{table}\n\n</details>"


def cell(rows, name):
    """'1.5061', with several seeds '1.5061 ± 0.0020', '' where nothing was measured."""
    values = losses(rows, name)
    if not values:
        return ""
    return f"{mean(rows, name):.4f}" + (f" ± {spread(rows, name):.4f}" if len(values) > 1 else "")


def summary_table(runs, published):
    """How much of the sweep there is, and how it was run."""
    gone = missing(runs)
    text = f"{len(runs)} of 56 runs, {len(gone)} missing"
    if gone:
        text += ": " + ", ".join(map(str, gone[:3])) + (f" and {len(gone) - 3} more" if len(gone) > 3 else "")
    rows = [row for rows in runs.values() for row in rows]
    if not rows:
        return text + "."
    def all_of(name):
        return ", ".join(sorted({row[name] for row in rows} - {""})) or "no"
    counts = Counter(len(rows) for rows in runs.values())
    seeds = "; ".join(f"{runs} with {n} seed{'s' * (n > 1)}" for n, runs in sorted(counts.items()))
    hours = sum(float(row["train_s"] or 0) for row in rows) / 3600
    return (f"{text}; {seeds}. Settings: batch {all_of('batch_size')} × {all_of('block_size')} characters, "
            f"{all_of('max_iters')} iterations, learning rate {all_of('learning_rate')}, dropout "
            f"{all_of('dropout')}, encodings at {all_of('pe_at')}; {all_of('dtype')} on {all_of('device')}, "
            f"torch {all_of('torch')}; {hours:.2f} hours of training in all.")


def runs_table(runs, published):
    """Every run with all its losses, lowest val loss first; "dropout on": in attention, in evaluation too."""
    columns = {"train_loss": "train loss", "val_loss": "val loss", "best_val_loss": "best val loss",
               "published_train_loss": "train, dropout on", "published_val_loss": "val, dropout on"}
    theirs = bool(paired(runs, "val_loss", published, "val_loss"))
    table = []
    for run, rows in sorted(runs.items(), key=lambda item: mean(item[1], "val_loss") or math.inf):
        line = [*run, *(cell(rows, name) for name in columns)]
        if theirs:
            line += [published.get(run, [defaultdict(str)])[0][name] for name in ("train_loss", "val_loss")]
        table.append(line)
    header = [*Run._fields, *columns.values(), *["published train", "published val"] * theirs]
    return folded(f"All {len(runs)} runs, by val loss", markdown(header, table))


def factor_tables(runs, published, factor):
    """gpt_v3's losses with a column for each level of a factor, the configurations that do best first."""
    parts = []
    for name, title in LOSSES.items():
        levels, table = matched(runs, factor, name)
        if not table:
            return "No run of gpt_v3 yet."
        means = {rest: {level: mean(rows, name) for level, rows in row.items()}
                 for rest, row in table.items()}
        whole = [row for row in means.values() if len(row) == len(levels)]
        wins = Counter(min(row, key=row.get) for row in whole)
        summary = f"<b>{title} by {factor}</b>, {len(whole)} complete configurations: " + "; ".join(
            f"{level} lowest in {wins[level]}, mean {statistics.mean(row[level] for row in whole):.4f}"
            for level in levels) if whole else f"<b>{title} by {factor}</b>, no complete configuration yet"
        lines = []
        for rest in sorted(table, key=lambda rest: min(means[rest].values())):
            cells = [cell(table[rest].get(level, []), name) for level in levels]
            best = levels.index(min(means[rest], key=means[rest].get))
            cells[best] = f"**{cells[best]}**"
            lines.append([*rest, *cells])
        header = [*(other for other in FACTORS if other != factor),
                  *(level if factor == "pe_type" else f"{factor} {level}" for level in levels)]
        parts.append(folded(summary, markdown(header, lines)))
    return "\n\n".join(parts)


def seeds_table(runs, published):
    """Differences between encodings, and which of them are smaller than what another seed changes."""
    parts = []
    for name, title in LOSSES.items():
        levels, table = matched(runs, "pe_type", name)
        lines, noise, pairs = [], 0, list(combinations(levels, 2))
        for rest, row in sorted(table.items()):
            if len(row) < len(levels) or min(len(losses(rows, name)) for rows in row.values()) < 2:
                continue
            line = [*rest, min(len(losses(rows, name)) for rows in row.values()),
                    *(cell(row[level], name) for level in levels)]
            for a, b in pairs:
                difference = mean(row[b], name) - mean(row[a], name)
                small = abs(difference) < max(spread(row[a], name), spread(row[b], name))
                noise += small
                line.append(f"{difference:+.4f}" + " (noise)" * small)
            lines.append(line)
        if not lines:
            return "No configuration has several seeds for every encoding: differences may be noise."
        header = [*FACTORS[1:], "seeds", *levels, *(f"{b} − {a}" for a, b in pairs)]
        parts.append(f"{title.capitalize()}, mean ± standard deviation over seeds. Of "
                     f"{len(lines) * len(pairs)} differences between encodings {noise} are noise: smaller "
                     f"than the larger of the two standard deviations.\n\n{markdown(header, lines)}")
    return "\n\n".join(parts)


def published_table(runs, published):
    """How far our losses are from the published ones, and whether they rank configurations alike."""
    lines = []
    for name, title in LOSSES.items():
        for ours, how in ((f"published_{name}", "as published, attention dropout on in evaluation"),
                          (name, "correct, no dropout in evaluation")):
            pairs = paired(runs, ours, published, name)
            if pairs:
                rank = spearman(pairs)
                lines.append([title, how, len(pairs), f"{statistics.mean(abs(a - b) for a, b in pairs):.4f}",
                              "" if rank is None else f"{rank:.3f}"])
    if not lines:
        return "No run has the settings of a published one, so there is nothing to compare."
    return markdown(["loss", "our evaluation", "runs", "mean absolute difference", "Spearman"], lines)


TABLES = {"summary": summary_table, "runs": runs_table,
          **{factor: partial(factor_tables, factor=factor) for factor in FACTORS},
          "seeds": seeds_table, "published": published_table}


# --- Figures -----------------------------------------------------------------------------------------------

def markers_of(runs):
    """The marker of each width, {n_embd: marker}."""
    return dict(zip(sorted({run.n_embd for run in runs}), cycle("os^D")))


def dots(axes, runs, x, y, **style):
    """A mark for each run at (x(rows), y(rows)): its encoding as colour, its width as marker."""
    markers = markers_of(runs)
    for run, rows in runs.items():
        if x(rows) is not None and y(rows) is not None:
            axes.plot(x(rows), y(rows), markers[run.n_embd],
                      **{"color": PES[run.pe_type], "markersize": 7, "markeredgecolor": "white", **style})


def legend(axes, runs, *more):
    """Names the colours and the markers of dots."""
    def handle(label, **style):
        return Line2D([], [], linestyle="", label=label, **style)
    pes = {run.pe_type for run in runs}
    axes.legend(frameon=False, handles=[
        *(handle("learned" if pe == "None" else pe, color=PES[pe], marker="o") for pe in PES if pe in pes),
        *(handle(f"{width} wide", color="0.5", marker=marker) for width, marker in markers_of(runs).items()),
        *more])


def losses_figure(runs, published):
    """Train against val loss: the further above the diagonal, the more a run overfits."""
    figure, axes = plt.subplots(figsize=(6.4, 5.2))
    dots(axes, runs, lambda rows: mean(rows, "train_loss"), lambda rows: mean(rows, "val_loss"))
    diagonal(axes)
    axes.set(xlabel="final train loss", ylabel="final val loss", title="Fit and generalization")
    legend(axes, runs)
    return figure


def params_figure(runs, published):
    """Loss against parameters: every run, and the mean of each encoding over heads."""
    figure, panels = plt.subplots(1, 2, figsize=(9.6, 4.4), sharex=True)
    for axes, (name, title) in zip(panels, LOSSES.items()):
        dots(axes, runs, lambda rows: mean(rows, "params"), lambda rows: mean(rows, name),
             markersize=5, alpha=0.5)
        ticks = set()
        for pe in list(PES)[1:]:
            sizes = defaultdict(list)
            for run, rows in runs.items():
                if run.pe_type == pe and losses(rows, name) and losses(rows, "params"):
                    sizes[mean(rows, "params")].append(mean(rows, name))
            axes.plot(sorted(sizes), [statistics.mean(sizes[x]) for x in sorted(sizes)], color=PES[pe])
            ticks |= set(sizes)
        axes.set(xlabel="parameters, millions", ylabel=f"final {title}", xscale="log",
                 title=f"{title.capitalize()} against size")
        axes.set_xticks(sorted(ticks), [f"{size / 1e6:.3g}" for size in sorted(ticks)])
        axes.minorticks_off()
    legend(panels[0], runs)
    return figure


def pe_figure(runs, published):
    """What the encodings change in each configuration: the loss less the mean of the three."""
    figure, panels = plt.subplots(1, 2, figsize=(9.6, 5.6), sharey=True)
    tables = [{rest: row for rest, row in matched(runs, "pe_type", name)[1].items() if len(row) == 3}
              for name in LOSSES]
    rests = sorted({rest for table in tables for rest in table}, reverse=True)
    for axes, table, (name, title) in zip(panels, tables, LOSSES.items()):
        for rest, row in table.items():
            middle, y = statistics.mean(mean(rows, name) for rows in row.values()), rests.index(rest)
            for level, rows in row.items():
                axes.errorbar(mean(rows, name) - middle, y, xerr=spread(rows, name) or None, fmt="o",
                              color=PES[level], markeredgecolor="white", markersize=7, elinewidth=1)
        axes.axvline(0, color="0.7", linewidth=1, zorder=0)
        axes.set(xlabel=f"{title} less the mean of the three", title=f"{title.capitalize()} by encoding")
        axes.set_yticks(range(len(rests)), ["{} wide, {} heads, {} layers".format(*rest) for rest in rests])
    handles = [Line2D([], [], color=PES[pe], marker="o", linestyle="", label=pe) for pe in list(PES)[1:]]
    figure.legend(handles=handles, frameon=False, ncols=3, loc="outside upper right")
    return figure


def published_figure(runs, published):
    """Losses as they were published, with attention dropout on in evaluation, against the correct ones."""
    figure, panels = plt.subplots(1, 2, figsize=(9.6, 4.8))
    for axes, (name, title) in zip(panels, LOSSES.items()):
        dots(axes, runs, lambda rows: mean(rows, name), lambda rows: mean(rows, f"published_{name}"))
        for x, y in paired(runs, name, published, name):
            axes.plot(x, y, "x", color="0.3", zorder=0)
        diagonal(axes)
        axes.set(xlabel=f"our {title}, evaluated without dropout", ylabel=f"{title}, evaluated as published",
                 title=f"{title.capitalize()} as published")
    theirs = Line2D([], [], color="0.3", marker="x", linestyle="", label="published number")
    legend(panels[0], runs, *[theirs] * bool(paired(runs, "val_loss", published, "val_loss")))
    return figure


def diagonal(axes):
    """The line on which both losses are equal, where it crosses the figure."""
    limits = axes.axis()
    axes.axline((0, 0), slope=1, color="0.6", linewidth=1, linestyle="--", zorder=0)
    axes.axis(limits)


FIGURES = {  # each with the column that it cannot be drawn without
    "losses": (losses_figure, "train_loss"), "params": (params_figure, "params"),
    "pe": (pe_figure, "val_loss"), "published": (published_figure, "published_val_loss")}


# --- Writing -----------------------------------------------------------------------------------------------

def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path, help="a CSV of sweep.sh")
    parser.add_argument("--check", action="store_true", help="write nothing, status 1 if something differs")
    args = parser.parse_args()
    runs, published = read(args.csv), read(PUBLISHED)

    old = README.read_text(encoding="utf-8")
    block = re.compile(rf"(<!-- report:{re.escape(args.csv.stem)} (\w+) -->\n).*?(<!-- /report -->)", re.S)
    stale = []

    def fill(match):
        if match[2] not in TABLES:
            fail(f"{README.name}: there is no table {match[2]}; there are {', '.join(TABLES)}")
        new = f"{match[1]}{TABLES[match[2]](runs, published)}\n{match[3]}"
        if new != match[0]:
            stale.append(f"{README.name}, table {match[2]}")
        return new

    new = block.sub(fill, old)
    made_from = hashlib.sha256()
    for path in (args.csv, PUBLISHED, Path(__file__)):
        made_from.update(path.read_bytes())
    figures = {args.csv.with_name(f"{args.csv.stem}_{name}.png"): draw
               for name, (draw, column) in FIGURES.items()
               if any(losses(rows, column) for rows in runs.values())}
    for path in figures:
        if not path.exists() or made_from.hexdigest().encode() not in path.read_bytes():
            stale.append(str(path))
    if args.check:
        if stale:
            fail(f"{stale[0]} is not what {args.csv} gives; write it with report.py {args.csv}", 1)
        return

    if not block.search(old):
        print("\n\n".join(f"## {name}\n\n{table(runs, published)}" for name, table in TABLES.items()))
    if new != old:
        README.write_text(new, encoding="utf-8")
    plt.rcParams |= {"axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
                     "axes.grid": True, "grid.color": "0.93", "axes.titlelocation": "left",
                     "axes.titleweight": "bold", "axes.titlesize": 11, "figure.constrained_layout.use": True}
    for path, draw in figures.items():
        figure = draw(runs, published)
        figure.savefig(path, dpi=140, metadata={"Source": made_from.hexdigest()})
        plt.close(figure)
    print(f"{args.csv}: {len(runs)} runs, {len(missing(runs))} of 56 missing", file=sys.stderr)


if __name__ == "__main__":
    main()
